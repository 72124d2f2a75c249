"""The doors: the command line and the files that run it on a cluster."""
