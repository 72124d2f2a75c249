"""An exported model as a run of a workspace: evaluated there as it predicts, it stands in every table beside the others.

Its specification is that of the run it was exported from and, besides, names the very folder by the digest of its files; so
it has a name and a row of its own, and is known by what its folder holds, as every run.
"""

from __future__ import annotations

import re
from dataclasses import replace

from upath import UPath

from cafe.data.manifest import NAME
from cafe.files import encode_json, list_folder, place_below, read_file, write_file
from cafe.pipeline.models import read_averages
from cafe.pipeline.runs import DECIDING, EXPORTED, RunSpec, add_experiment, check_exported, is_finished, read_model
from cafe.pipeline.workspace import Workspace
from cafe.records import digest
from cafe.seals import write_sealed

RECORD = "model.json"


def specify_export(folder: UPath) -> RunSpec:
    """Return the specification of an exported folder as a run of its own.

    Raises `DamagedError` for a folder whose files are not those that were exported.
    """
    check_exported(folder)
    spec, digests = RunSpec.load(folder), _digest_files(folder)
    content = digest(encode_json({**digests, "averaged": list(read_averages(folder))}))
    label = folder.name if re.fullmatch(NAME, folder.name) and not folder.name.startswith(spec.name) else "exported"
    return replace(spec, exported=f"{label}:{content}")


def adopt(workspace: Workspace, folder: UPath, experiment: str) -> UPath:
    """Return the folder of the run that an exported folder is in a workspace; it is made where there is none yet."""
    spec, record = specify_export(folder), read_model(folder)
    run = workspace.run_path(spec.name)
    if not is_finished(run):
        for path in list_folder(folder):
            if path.suffix in DECIDING:
                write_file(place_below(run / EXPORTED, path.name), read_file(path))
        spec.save(run, record.get("origin", {}).get("not_as_published", ()))
        write_sealed(run / "result.json", record.get("trained") or {"epochs": spec.recipe["epochs"]})  # the last
    add_experiment(run, experiment)
    return run


def _digest_files(folder: UPath) -> dict[str, str]:
    """Return the digests of the files by which a folder predicts; its own record holds them, and is none of them."""
    paths = [path for path in list_folder(folder) if path.suffix in DECIDING and path.name != RECORD]
    return {path.name: digest(read_file(path)) for path in paths}
