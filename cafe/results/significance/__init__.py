"""What the differences between rows are worth: statistics, the paired tests over faces, and the verdicts drawn from them."""
