"""Learning: views, batches, the training loops, and the trainable image branches."""
