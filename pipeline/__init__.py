"""The engine: workspace, runs, feature stores, training, evaluation, benchmarks, tracking, release."""
