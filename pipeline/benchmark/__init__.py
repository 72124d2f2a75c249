"""A benchmark: its file, the plan of a grid that follows from it, and the cells at work."""
