"""MLflow as a mirror of the workspace: the pages it shows, its database, and what brings one to the other."""
