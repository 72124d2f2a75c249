"""The commands about frozen towers: what their layers are and cost, and how well these tell expressions apart."""

from __future__ import annotations

from typing import Any

import click
from click.shell_completion import CompletionItem

from cafe.jobs.names import complete, list_names
from cafe.jobs.options import Whole
from cafe.jobs.tables import FittedTable, show_records
from cafe.jobs.terminal import Commands, echo, json_option, open_workspace, progress_bar, show, show_json
from cafe.pipeline.settings import LARGEST


class _Towers(Commands):
    """Takes `cafe tower NAME` for `cafe tower layers NAME`."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        known = args and (args[0] in self.commands or args[0].startswith("-"))
        return super().resolve_command(ctx, args if known else ["layers", *args])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete its commands, and the towers that may stand in their place."""
        towers = (name for name in list_names("tower", ctx) if name.startswith(incomplete))
        return [*super().shell_complete(ctx, incomplete), *map(CompletionItem, towers)]


@click.group(cls=_Towers)
def tower() -> None:
    """Frozen towers: list them, their layers, and which to read.

    \b
    cafe tower list                                         # which there are, their size, licence and training pictures
    cafe tower face-resnet                                  # its layers, their maps and what they cost
    cafe tower probe news --backbone face-resnet            # how well they do, on faces held out of news
    """


@tower.command("list")
@json_option
def list_all(as_json: bool) -> None:
    """List the towers there are: size, licence, origin.

    Nothing is loaded or fetched. All others of timm and open_clip work by their names too (docs/towers.md).

    \b
    cafe tower list
    """
    from cafe.towers.catalogue import list_towers

    records = list_towers()
    if as_json:
        show_json(records)
        return
    header = ["tower", "weights", "licence", "trained on", "saw target", "million parameters", "pixels", "channels"]
    table = FittedTable(header, words=5, order=[5, 6, 7, 4, 2, 1, 3], elsewhere="--json")
    for record in records:
        size = "–" if record["parameters"] is None else f"{record['parameters'] / 1e6:.1f}"
        saw = "–" if record["may_have_seen"] is None else "perhaps" if record["may_have_seen"] else "no"
        table.add_row(
            record["tower"], record["weights"], record["licence"] or "–", record["trained_on"] or "–", saw, size,
            record["input_size"] or "–", record["channels"] or "–",
        )  # fmt: skip
    show(table)
    seen = {name for record in records for name in record["may_have_seen"] or ()}
    echo(
        f"Saw target: pictures of {', '.join(sorted(seen))} come from where the tower's training pictures come from, so "
        "that some may be among them. None was seen with the expression it shows."
    )


@tower.command()
@click.argument("backbone", metavar="TOWER", shell_complete=complete("tower"))
@click.option("--input-size", type=Whole(16, 4096), help="Side of the input in pixels; default: the tower's own.")
@json_option
def layers(backbone: str, input_size: int | None, as_json: bool) -> None:
    """List the layers of a tower with their maps and cost.

    \b
    cafe tower face-resnet
    """

    from cafe.towers.building import load_backbone
    from cafe.towers.names import END, FINAL, Layer
    from cafe.towers.probe import time_layer

    loaded = load_backbone(backbone, input_size=input_size)
    facts = loaded.facts
    records = []
    for name in loaded.layers:
        layer = END if name == FINAL else Layer(name, "1x1")
        there = loaded.describe(layer)
        shape = "×".join(map(str, there.map_shape)) if there.map_shape else "none"
        cost = round(1000 * time_layer(loaded, layer), 1)
        records.append({"layer": name, "map": shape, "channels": there.width, "ms_per_face": cost})
    title = f"{backbone} at {facts.input_size} px: {loaded.layer}, {facts.width} channels"
    show_records(records, as_json, words=2, title=title)


@tower.command()
@click.argument("source", shell_complete=complete("manifest"))
@click.option(
    "--backbone",
    "backbones",
    required=True,
    multiple=True,
    help="Tower to probe; may be given several times.",
    shell_complete=complete("tower"),
)
@click.option("--faces", default=3000, show_default=True, type=Whole(20, LARGEST), help="Training faces to use.")
@click.option("--input-size", type=Whole(16, 4096), help="Side of the input in pixels; default: the tower's own.")
@json_option
def probe(source: str, backbones: tuple[str, ...], faces: int, input_size: int | None, as_json: bool) -> None:
    """Find the layer that tells expressions apart best.

    \b
    cafe tower probe news --backbone face-resnet

    A linear classifier is fitted on training faces of SOURCE and evaluated on others of them that were held out; no target
    plays a part. The best line is what to write behind `cafe extract --backbone`.
    """
    from cafe.pipeline.process.machine import own_device
    from cafe.towers.building import load_backbone
    from cafe.towers.names import split_name
    from cafe.towers.probe import choose_faces, probe_layers

    manifest = open_workspace().load_manifest(source)
    device = own_device(None)
    fitted, tested = choose_faces(manifest, faces)
    results = []
    for name in backbones:
        loaded = load_backbone(name, input_size=input_size)
        with progress_bar(f"Probing {name}") as progress:
            head = split_name(name)[0]
            results += [(head, result) for result in probe_layers(loaded, manifest, fitted, tested, device, progress)]
    records = [
        {
            "backbone": f"{head}#{result.layer}", "channels": result.width,
            "accuracy_percent": _percent(result.accuracy), "error_percent": _percent(result.error),
            "mean_class_percent": _percent(result.mean_class_accuracy),
        }
        for head, result in sorted(results, key=lambda pair: -pair[1].accuracy)
    ]  # fmt: skip
    title = f"{source}: fitted on {len(fitted):,} faces, evaluated on {len(tested):,} held out"
    show_records(records, as_json, title=title)


def _percent(share: float) -> float:
    return round(100 * share, 1)
