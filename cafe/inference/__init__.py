"""A trained method at work: faces that are in no manifest, photographs and films."""
