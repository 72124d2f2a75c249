"""Results: predictions and every number computed from them."""
