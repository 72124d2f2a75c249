"""Where a tracking server says that its artifacts lie: the server is the user's own, whatever else it names is not."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from cafe.addresses import WEB, permission
from cafe.errors import UserError
from cafe.pipeline.process.command import hide_secrets

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def check_place(server: str, place: str) -> None:
    """Raise `UserError` for a place that a tracking server chose and this command may not ask or read.

    What the server hands out itself is fetched, and what lies in an object store, whose keys the user configured. A folder
    of this machine is read for a server or a database that runs here; another server is asked where the user allows it.
    """
    there, own, shown = urlsplit(place), urlsplit(server), hide_secrets(server)
    if there.scheme in (*WEB, "mlflow-artifacts") and there.netloc in ("", own.netloc):
        return
    if there.scheme in ("", "file") and own.scheme in WEB and own.hostname not in LOOPBACK:
        raise UserError(
            f"The tracking server {shown} says that artifacts lie in {place!r}, a folder of this machine: let it hand them "
            "out itself (`mlflow server --serve-artifacts`)."
        )
    web = there.scheme == "mlflow-artifacts"  # which MLflow asks by HTTP too
    if not permission().allows_private(place, "http" if web else there.scheme):
        raise UserError(
            f"The tracking server {shown} says that artifacts lie at {place!r}, and MLflow follows where that leads, also "
            "to this machine or its own network: where you trust the server, give --allow-private-urls too."
        )


def check_repository(server: str, repository: Any) -> None:
    """Raise `UserError` as `check_place` does for a repository of MLflow's, through those that only point to another."""
    while (inner := getattr(repository, "repo", None)) is not None:
        repository = inner
    check_place(server, repository.artifact_uri)
