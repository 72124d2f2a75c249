"""Drawn faces in five domains, so that everything runs without any data set."""
