"""The workspace's own MLflow database, made and asked with SQLite alone: MLflow takes seconds to start, and to make one.

Whatever is not as expected here is left to MLflow itself.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing, suppress
from importlib.metadata import version
from pathlib import Path

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


def make_database(path: Path) -> None:
    """Make an empty database as the installed MLflow does in dozens of migrations, unless there is one.

    `mlflow-VERSION.sql` holds what these lead to; MLflow migrates by itself where there is none of its version.
    """
    schema = Path(__file__).with_name(f"mlflow-{version('mlflow')}.sql")
    if path.exists() or not schema.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    with closing(sqlite3.connect(draft)) as database:
        database.executescript(schema.read_text())
    with suppress(OSError):
        os.link(draft, path)  # whole, and only where no other command has made one meanwhile
    draft.unlink()


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
