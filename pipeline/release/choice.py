"""Which model: the words by which commands and programs name one, and what of a command line is a model and what a photo."""

from __future__ import annotations

import glob
from collections.abc import Sequence

from upath import UPath

from cafe.addresses import own
from cafe.errors import UserError
from cafe.files import list_folder, locate, retry
from cafe.inference.frames import find_files
from cafe.pipeline.release.shipped import SHIPPED, find_shipped, is_export, shipped_models
from cafe.pipeline.workspace import Workspace
from cafe.results.runs import choose

WEB = ("http://", "https://")
ADDRESSES = ("models:/", "runs:/")  # of MLflow


def find_runs(
    workspace: Workspace, name: str, best: str | None = None, ensemble: bool = False
) -> tuple[list[UPath], str]:
    """Return the folders of the runs that a model consists of, and why these; raise `UserError`.

    Without `best` the name is a run's, `shipped` or the name of a model that ships, the path of an exported folder, or an
    address of MLflow's such as `models:/faces/1`. `ensemble` adds the other seeds of a run.
    """
    if best is None and (folder := find_exported(workspace, name)):
        if ensemble:
            raise UserError(f"{name!r} is one exported model without other seeds: leave --ensemble out.")
        ships = folder in shipped_models().values()
        return [folder], f"Model {folder.name}, which comes with this package." if ships else f"Model {name}."
    runs = workspace.read_runs("" if ensemble or best is not None else name)
    if not runs and best is None:
        shipped = ", ".join([SHIPPED, *shipped_models()])
        raise UserError(
            f"Unknown model {name!r}: this workspace has no run yet; choose {shipped}, or give a folder of `cafe export`."
        )
    chosen, reason = (
        choose(runs, experiment=name, best=best, ensemble=ensemble)
        if best is not None
        else choose(runs, name=name, ensemble=ensemble)
    )
    return [run.folder for run in chosen], f"{reason}."


def find_exported(workspace: Workspace, name: str) -> UPath | None:
    """Return the folder of an exported run, fetched from MLflow where the name is an address there; None for other names."""
    if name.startswith(ADDRESSES):
        from cafe.pipeline.tracking.mirror import Mirror

        return Mirror(workspace).fetch_model(name)
    if folder := find_shipped(name):
        return folder
    own(name)
    folder = locate(name)
    return folder if is_export(folder) else None


def split_words(
    workspace: Workspace, words: Sequence[str], model: str | None = None, best: str | None = None
) -> tuple[str, list[str]]:
    """Return the name of the model and the places of photos among the words of a command.

    All words are places where the model is named apart. Else the first one is the model if it names one and no file, and if
    it names none the model that ships is taken. Raises `UserError` for a first word that could be either, or is neither.
    """
    if model is not None:
        return model, list(words)
    first, *others = words
    place = names_place(first)
    if names_model(workspace, first, best, place):
        if place:
            raise UserError(
                f"{first!r} is a file or folder and names a model too: write ./{first} for the file, or --model {first} for "
                "the model."
            )
        if not others:
            raise UserError(f"{first!r} is a model, and no photo is named: give photos, videos or folders behind it.")
        return first, others
    if best is not None:
        raise UserError(f"--best chooses a run of an experiment, and {first!r} is none: name it with --model.")
    if not place:
        raise UserError(
            f"There is neither a file nor a model {first!r}: give photos, videos, folders or patterns such as "
            "'faces/*.jpg', and before them, if you like, one of the models that `cafe models` lists."
        )
    return SHIPPED, list(words)


def names_place(word: str) -> bool:
    """Whether a word stands for photos or videos: `-`, an address, a file or a folder, or a pattern that files match."""
    if word == "-" or word.startswith(WEB):
        return True
    if word.startswith(ADDRESSES):
        return False
    path = locate(word)
    if retry(path, "read", path.is_file):
        return True
    if is_export(path):
        return _holds_pictures(word)
    if path.exists():
        return True
    return glob.has_magic(word) and bool(glob.glob(str(path), recursive=True))  # noqa: PTH207  # also absolute


def names_model(workspace: Workspace, word: str, best: str | None, place: bool) -> bool:
    """Whether a word names a model, with `best` an experiment; without, the mistake of an experiment alone counts too.

    A `place` of photos is no such mistake.
    """
    if best is None and not word.startswith(WEB):
        if word == SHIPPED or word in shipped_models() or word.startswith(ADDRESSES) or is_export(locate(word)):
            return True
        if any(name.startswith(word) for name in workspace.run_names()):
            return True
    if best is None and place:
        return False
    runs = (workspace.run_path(name) for name in workspace.run_names())
    return any(path.stem == word for run in runs for path in list_folder(run / "experiments"))


def _holds_pictures(folder: str) -> bool:
    try:
        return bool(find_files([folder]).files)
    except UserError:
        return False
