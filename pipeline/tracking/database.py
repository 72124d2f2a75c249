"""The workspace's own MLflow database, asked with SQLite alone, since MLflow takes seconds to start.

Whatever is not as expected here is left to MLflow itself.
"""

from __future__ import annotations

import os
import re
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cafe.errors import UserError, quote
from cafe.pipeline.process.command import hide_secrets

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")  # that MLflow keeps runs in
DRIVERS = {"psycopg": "'psycopg[binary]'", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}  # by their modules

SHOWN = """
SELECT 1 FROM tags JOIN runs USING (run_uuid) JOIN experiments USING (experiment_id)
WHERE experiments.name = ? AND runs.name = ? AND runs.lifecycle_stage = 'active' AND tags.key = ? AND tags.value = ?
"""
ELSEWHERE = """
SELECT DISTINCT artifact_location FROM experiments
WHERE artifact_location LIKE 'file:%/artifacts' AND artifact_location != ?
"""
MOVES = (
    "UPDATE runs SET artifact_uri = :new || substr(artifact_uri, length(:old) + 1)"
    " WHERE substr(artifact_uri, 1, length(:old)) = :old",
    "UPDATE logged_models SET artifact_location = :new || substr(artifact_location, length(:old) + 1)"
    " WHERE substr(artifact_location, 1, length(:old)) = :old",
    "UPDATE experiments SET artifact_location = :new WHERE artifact_location = :old",
)


def address_of(path: Path) -> str:
    """Return the URI of a database; raise `UserError` for a path that SQLAlchemy reads as another one.

    Its releases before 2.1 cannot write a question mark: they took what follows for options and made the database elsewhere.
    """
    from sqlalchemy import URL, make_url

    uri = URL.create("sqlite", database=str(path)).render_as_string()
    if make_url(uri).database != str(path):
        raise UserError(f"MLflow's database cannot be kept at {path}: give a --workspace without ?, # and %.")
    return uri


def check_uri(uri: str) -> None:
    """Raise `UserError` for the address of a server or a database that MLflow cannot use from here; ask no server.

    MLflow itself would find out when a training is shown for the first time, or after it.
    """
    scheme = (re.match(r"[A-Za-z][\w+.-]*(?=:)", uri) or [""])[0].lower()
    shown = f"--mlflow-uri {hide_secrets(uri)}"
    remedy = "give http://HOST:PORT of a server, or sqlite:////FOLDER/mlflow.db"
    if scheme in ("", "file"):
        raise UserError(f"{shown} is a folder, in which MLflow keeps no runs any more: {remedy}.")
    if scheme in ("http", "https"):
        if not _names_host(uri):
            raise UserError(f"{shown} is no address of a server: {remedy}.")
    elif scheme.partition("+")[0] in DATABASES:
        _check_driver(uri, shown, remedy)
    elif scheme != "databricks":
        raise UserError(f"{shown} is nothing that MLflow reads: {remedy}.")


def _names_host(uri: str) -> bool:
    """Whether the address of a server names its host and, where it names a port, that is a number."""
    try:
        place = urlsplit(uri)
        return bool(place.hostname) and place.port != 0
    except ValueError:
        return False


def _check_driver(uri: str, shown: str, remedy: str) -> None:
    """Raise `UserError` unless SQLAlchemy reads the address of a database and has the package that speaks to it."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import SQLAlchemyError

    try:
        make_url(uri).get_dialect().import_dbapi()
    except (SQLAlchemyError, ValueError) as error:  # the second of a port
        raise UserError(f"{shown} is no address of a database ({quote(error)}): {remedy}.") from None
    except ImportError as error:
        package = DRIVERS.get(error.name or "", error.name or "its driver")
        raise UserError(f"{shown} needs a driver ({quote(error)}): run `pip install {package}`.") from None


def check_database(path: Path) -> None:
    """Raise `UserError` for a file that is no database of SQLite's: MLflow would try for two minutes to open it."""
    if not path.exists():
        return
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True)) as database:
            database.execute("PRAGMA schema_version").fetchone()
    except sqlite3.Error as error:
        raise UserError(f"{path} cannot be opened ({quote(error)})") from None


@contextmanager
def draft_database(path: Path) -> Iterator[Path]:
    """Yield a draft, to be made into a database that then appears at `path`, unless one was made there meanwhile.

    Nothing waits until the draft is on disk, which takes MLflow's dozens of migrations most of their time: before it is
    whole there is nothing to lose.
    """
    from sqlalchemy import Engine, event

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        draft, copy = Path(folder, "draft.db"), Path(folder, "copy.db")
        event.listen(Engine, "connect", _leave_unsynchronised)
        try:
            yield draft
        finally:
            event.remove(Engine, "connect", _leave_unsynchronised)
        # A copy, which none of the connections is open to that MLflow keeps.
        with closing(sqlite3.connect(draft)) as made, closing(sqlite3.connect(copy)) as database:
            made.backup(database)
        with suppress(OSError):  # there is one meanwhile, or no such thing as a link: then MLflow makes it in place
            os.link(copy, path)


def _leave_unsynchronised(connection: Any, record: object) -> None:
    """Have a new connection not wait for the disk; an event of SQLAlchemy's, through which MLflow opens its databases."""
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous = OFF")


def has_tag(path: Path, experiment: str, run: str, tag: str, value: str) -> bool:
    """Whether a run of that name in an experiment has a tag of that value, as far as the database can be read."""
    if not path.exists():
        return False
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
            return database.execute(SHOWN, (experiment, run, tag, value)).fetchone() is not None
    except sqlite3.Error:
        return False


def move_artifacts(path: Path, place: str) -> None:
    """Have all runs keep their files at `place`, a URI, beside a database that was moved or copied with its workspace."""
    if not path.exists():
        return
    with suppress(sqlite3.Error), closing(sqlite3.connect(path)) as database, database:
        for (old,) in database.execute(ELSEWHERE, (place,)).fetchall():
            for statement in MOVES:
                database.execute(statement, {"old": old, "new": place})
