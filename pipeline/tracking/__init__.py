"""MLflow as a mirror of the workspace: the pages it shall show, its database, and what brings one to the other."""
