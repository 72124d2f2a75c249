"""`cafe store …`: list feature stores, verify and repair them, and remove those nobody needs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from cafe.errors import IncompleteError
from cafe.jobs.options import options
from cafe.jobs.tables import make_table
from cafe.jobs.terminal import (
    Commands,
    echo,
    interruptible,
    json_option,
    open_workspace,
    progress_bar,
    show,
    show_json,
)
from cafe.pipeline.settings import ClusterSettings

if TYPE_CHECKING:
    from cafe.pipeline.stores import StoreFacts

DAY = 86_400.0
names_argument = click.argument("names", nargs=-1, metavar="[STORE]...")


@click.group(cls=Commands)
def store() -> None:
    """Feature stores: list, verify, repair or remove them.

    STORE is MANIFEST/FOLDER as `cafe store ls` shows it, its unambiguous beginning, or a manifest for all of its stores.
    """


@store.command("ls")
@names_argument
@json_option
def list_all(names: tuple[str, ...], as_json: bool) -> None:
    """List stores with size, age and the runs that use them."""
    from cafe.pipeline.stores import find_paths, list_stores

    workspace = open_workspace()
    stores = list_stores(workspace, find_paths(workspace, names))
    if as_json:
        show_json([facts.record() for facts in stores])
        return
    header = [
        "store",
        "features",
        "worked on by",
        "shards",
        "faces",
        "MB",
        "days old",
        "runs trained",
        "runs evaluated",
    ]
    show(make_table(header, [_line(facts) for facts in stores], words=3, title=str(workspace.root)))


def _line(facts: StoreFacts) -> tuple[object, ...]:
    info, described = facts.info, ("unknown", "", "", "")
    if info:
        described = info.describe(), facts.holder, f"{facts.done} of {info.shards}", f"{info.rows:,}"
    age = f"{(time.time() - facts.made) / DAY:.1f}"
    return (facts.name, *described, f"{facts.bytes / 1e6:,.1f}", age, len(facts.trained), len(facts.evaluated))


@store.command("verify")
@names_argument
@json_option
def verify(names: tuple[str, ...], as_json: bool) -> None:
    """Read stores back, every byte, and name damaged files.

    \b
    cafe store verify news
    """

    from cafe.pipeline.features.key import store_name
    from cafe.pipeline.features.store import verify as verify_store
    from cafe.pipeline.stores import find_paths

    found = {}
    with interruptible("nothing was changed"), progress_bar("Verifying", "shards") as progress:
        for path in find_paths(open_workspace(), names):
            found[store_name(path)] = verify_store(path, progress)
    damaged = {name: damages for name, damages in found.items() if damages}
    if as_json:
        show_json([{"name": name, "damaged": list(map(vars, files))} for name, files in found.items()])
    else:
        for name in found:
            if name not in damaged:
                echo(f"{name}: every byte is what was written")
    if damaged:
        listed = "".join(f"\n  {name}/{one.file} {one.problem}" for name, files in damaged.items() for one in files)
        count = sum(map(len, damaged.values()))
        raise IncompleteError(f"{count} files are damaged: run `cafe store repair {' '.join(damaged)}`.{listed}")


@store.command("repair")
@click.argument("names", nargs=-1, required=True, metavar="STORE...")
@options(ClusterSettings)
def repair(names: tuple[str, ...], **values: Any) -> None:
    """Verify stores, then compute what is damaged, or was left undone.

    \b
    cafe store repair news

    Interrupt it as you like: the same command goes on where it was.
    """
    from cafe.pipeline.features.key import store_name
    from cafe.pipeline.stores import find_paths
    from cafe.pipeline.stores import repair as repair_store

    workspace = open_workspace()
    with interruptible(), progress_bar("Repairing") as progress:
        for path in find_paths(workspace, names):
            damages, shards = repair_store(workspace, path, ClusterSettings(**values), progress)
            done = f"{len(damages)} damaged files written again, computed {shards} shards"
            echo(f"{store_name(path)}: {done if damages or shards else 'nothing to do'}")


@store.command("rm")
@click.argument("names", nargs=-1, required=True, metavar="STORE...")
@click.option("--yes", is_flag=True, help="Do not ask.")
def remove(names: tuple[str, ...], yes: bool) -> None:
    """Remove stores, after saying what that means.

    \b
    cafe store rm news/clip-vit-b32-v61-0a1b2c3d4e5f
    """

    from cafe.pipeline.stores import find_paths, list_stores
    from cafe.pipeline.stores import remove as remove_store

    workspace = open_workspace()
    stores = list_stores(workspace, find_paths(workspace, names))
    for facts in stores:
        echo(_consequences(facts))
    if not yes:
        click.confirm(f"Remove {len(stores)} stores?", abort=True)
    for facts in stores:
        remove_store(facts.path)
        echo(f"Removed {facts.name}")


def _consequences(facts: StoreFacts) -> str:
    info, used = facts.info, sorted({*facts.trained, *facts.evaluated})
    what = f"{info.describe()}, {info.rows:,} faces" if info else "it does not say what it holds"
    again = f"; to have it again takes {info.rows * info.key.views:,} passes of the tower" if info else ""
    users = (
        f"used by {len(used)} runs ({', '.join(used)}), which keep their weights and scores, but need it to go on, to be "
        "evaluated again or repeated"
        if used
        else "used by no run"
    )
    return f"{facts.name}: {what}, {facts.bytes / 1e6:,.1f} MB{again}; {users}."
