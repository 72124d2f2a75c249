"""Networks: the trainable image branches, and what several workers share."""
