"""`cafe runs`, `cafe methods` and `cafe completion`: what there is to name on the command line."""

from __future__ import annotations

import click

from cafe.jobs.terminal import json_option, open_workspace, show_records


@click.command()
@json_option
def runs(as_json: bool) -> None:
    """List the runs of the workspace with what they were trained on and how far they are."""
    from cafe.files import read_json

    workspace = open_workspace()
    records = [
        {
            "run": run.name, "source": run.source, "method": run.method, "selection": run.selection,
            "status": (read_json(run.folder / "status.json") or {}).get("status", ""),
            "experiments": sorted(run.experiments), "seed": run.seed,
        }
        for run in workspace.read_runs()
    ]  # fmt: skip
    if not (records or as_json):
        click.echo(f"No run in {workspace.root} yet: train one with `cafe train --source NAME --method cafe`.")
        return
    show_records(records, as_json, words=6, title=str(workspace.root))


@click.command()
@json_option
def methods(as_json: bool) -> None:
    """List the methods, what they read of a face, and for how many epochs they were published."""
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
    """Print what lets a shell complete commands, options, and the names of runs, manifests and experiments of a workspace.

    \b
    eval "$(cafe completion bash)"                       # in ~/.bashrc; zsh: in ~/.zshrc
    cafe completion fish > ~/.config/fish/completions/cafe.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(ctx.find_root().command, {}, "cafe", "_CAFE_COMPLETE").source())
