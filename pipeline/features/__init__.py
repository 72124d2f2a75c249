"""Frozen features: the store that keeps them, a shard of it at work, and the extraction that fills it."""
