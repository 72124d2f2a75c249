"""Baselines that every method has to be compared with: the image branch alone, the features alone, the tower fine-tuned."""
