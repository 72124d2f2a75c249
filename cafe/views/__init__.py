"""Views: one augmented picture of one face, the same on every machine, on a CPU and on a card."""
