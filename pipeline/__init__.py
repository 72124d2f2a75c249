"""The engine: feature extraction with Ray Data, training with Ray Train, tracking with MLflow."""
