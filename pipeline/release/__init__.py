"""What a trained run becomes: a model for programs, an exported folder, a model of MLflow."""
