"""Learning: batches, the training loops, adaptation to a target, checkpoints."""
