"""Frozen towers: large image models that turn a face into features and are never trained."""
