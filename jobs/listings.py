"""`cafe runs`, `cafe models`, `cafe methods` and `cafe completion`: what there is to name on the command line."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from cafe.errors import IncompleteError, UserError
from cafe.jobs.names import complete
from cafe.jobs.tables import show_records
from cafe.jobs.terminal import echo, json_option, open_workspace, progress_bar, show, show_json

if TYPE_CHECKING:
    from cafe.pipeline.workspace import Workspace

SHARES = ("at_home", "unseen")  # the accuracies of a record


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=complete("run"))
@click.option(
    "--verify", is_flag=True, help="Read the files of all or the named runs, manifests and exports back, every byte."
)
@json_option
def runs(names: tuple[str, ...], verify: bool, as_json: bool) -> None:
    """List the runs of the workspace, or verify their files.

    Accuracies are in percent (in JSON from 0 to 1), on the source itself and as the mean over unseen targets, with the 95 %
    interval over faces.

    \b
    cafe runs
    cafe runs --verify
    cafe runs --verify model            # a folder of cafe export
    """
    from cafe.pipeline.release.catalogue import list_runs

    workspace = open_workspace()
    if verify:
        verify_files(workspace, names, as_json)
        return
    if names:
        raise UserError(f"All runs are listed: leave {names[0]!r} out, or give --verify too.")
    records = list_runs(workspace)
    if not (records or as_json):
        echo(f"No run in {workspace.root} yet: train one with `cafe train --source NAME --method cafe`.")
        return
    order = ("status", "unseen", "at_home", "epochs", "of", "ended")
    show_scored(records, as_json, words=6, title=str(workspace.root), order=order)


def verify_files(workspace: Workspace, names: Collection[str], as_json: bool) -> None:
    """Say of the files of some runs, manifests and exports, or of all, which are not what was written or never sealed.

    Raises `IncompleteError` that lists those that are damaged.
    """
    from cafe.files import list_folder, locate
    from cafe.pipeline.release.shipped import is_export, verify_export
    from cafe.seals import verify_file

    named = {name: folder for name in names if is_export(folder := locate(name))}
    exports = [*named.values()] if names else list(filter(is_export, list_folder(workspace.root / "exports")))
    rest = [name for name in names if name not in named]
    found: dict[str, list[str]] = {"whole": [], "unchecked": [], "damaged": []}
    with progress_bar("Verifying", "files") as progress:
        files = workspace.sealed_files(rest) if rest or not names else []
        for number, path in enumerate(files, start=1):
            found[verify_file(path)].append(str(path.relative_to(workspace.root)))
            progress(number, len(files))
        for folder in exports:
            for path, state in verify_export(folder):
                found[state].append(str(path))
    if as_json:
        show_json(found)
    else:
        echo(f"{len(found['whole'])} files: every byte is what was written")
        for name in found["unchecked"]:
            echo(f"{name}: unchecked, it was written before files had checksums")
    if found["damaged"]:
        listed = "".join(f"\n  {name}" for name in found["damaged"])
        raise IncompleteError(
            f"{len(found['damaged'])} files are not what was written: index, evaluate, train or export again what "
            f"they belong to.{listed}"
        )


@click.command()
@json_option
def models(as_json: bool) -> None:
    """List the models there are to predict with.

    Those that ship and, of the workspace, exported models and trained runs.

    Accuracy is in percent (in JSON from 0 to 1), on the source itself and as the mean over unseen targets, with the 95 %
    interval over faces; below it is chance, the share of the largest class.
    """
    from cafe.pipeline.release.catalogue import list_models

    records = list_models(open_workspace())
    if not (records or as_json):
        echo("No model comes with this installation, and this workspace has no trained run.")
        return
    show_scored(records, as_json, words=4, chance=True, order=("unseen", "at_home", "method", "source"))


def show_scored(
    records: Sequence[Mapping[str, Any]],
    as_json: bool,
    words: int,
    title: str = "",
    chance: bool = False,
    order: Sequence[str] = (),
) -> None:
    """Print records with accuracies: in a table in percent with their intervals over faces, and the doubtful ones marked."""
    shown = records if as_json else [_as_shown(record, chance) for record in records]
    show_records(shown, as_json, words, title, order)
    if not as_json and any(marks_doubt(record, name) for record in records for name in SHARES):
        from cafe.report.sheets.sheet import DOUBTFUL

        show(DOUBTFUL)


def _as_shown(record: Mapping[str, Any], chance: bool) -> dict[str, Any]:
    """Return a record as a table shows it: accuracies in percent, what is not known as a dash."""
    shown: dict[str, Any] = {}
    for name, value in record.items():
        if name in SHARES:
            share = _write_share(record, name)
            shown[name] = (
                [share, f"chance {_as_percent(record[f'{name}_chance'])}"] if chance and value is not None else share
            )
        elif name.rpartition("_")[0] not in SHARES:
            shown[name] = "–" if value is None else value
    return shown


def _write_share(record: Mapping[str, Any], name: str) -> str:
    ends = [record[f"{name}{end}"] for end in ("_low", "_high")]
    reach = "" if None in ends else f" ({'–'.join(map(_as_percent, ends))})"
    return f"{_as_percent(record[name])}{reach}{' ‡' * marks_doubt(record, name)}"


def marks_doubt(record: Mapping[str, Any], name: str) -> bool:
    """Whether tables mark an accuracy of a record, in which None stands for what is not known."""
    from cafe.results.metrics import is_doubtful

    low, chance = (math.nan if (value := record[f"{name}_{what}"]) is None else value for what in ("low", "chance"))
    return is_doubtful(low, chance, record[f"{name}_faces"] or 0)


def _as_percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


@click.command()
@json_option
def methods(as_json: bool) -> None:
    """List the methods: what they read, and their epochs.

    Epochs are those that a method was published with.
    """

    from cafe.methods import METHODS

    records = [
        {"method": name, "reads": sorted(kind.needs), "about": _about(kind), "epochs": kind.recipe_type().epochs}
        for name, kind in METHODS.items()
    ]
    show_records(records, as_json, words=3)


def _about(kind: type) -> str:
    return (kind.__doc__ or "").partition("\n")[0]


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print what lets a shell complete commands and names.

    Completed are options and choices, too, and the names of methods, towers, settings (`--set`), and of the runs, manifests
    and experiments of a workspace.

    \b
    eval "$(cafe completion bash)"                       # in ~/.bashrc; zsh: in ~/.zshrc
    cafe completion fish > ~/.config/fish/completions/cafe.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    echo(kind(ctx.find_root().command, {}, "cafe", "_CAFE_COMPLETE").source())
