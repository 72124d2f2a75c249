"""Accuracy against the number of views in the cache: what a smaller cache costs.

Trains CAFE from stores of V = 1, 2, 4, 8, 16 views (V - 1 augmented ones beside the clean one; V = 1 trains on the clean
one alone), everything else equal, and draws unseen accuracy with its interval over seeds.

    python measurements/views.py --workspace work --source news --targets news,cinema --out docs/views-news

The manifests must be there (`cafe data index …`, `cafe data synth`). Interrupt it as you like: the same command goes on.
"""

from __future__ import annotations

from collections import defaultdict

import click
from matplotlib.figure import Figure

from cafe.files import locate
from cafe.pipeline import cluster
from cafe.pipeline.features.extract import extract
from cafe.pipeline.plan import plan_training
from cafe.pipeline.process.progress import no_bar
from cafe.pipeline.settings import ExtractSettings, TrainSettings
from cafe.pipeline.tracking.mirror import Mirror
from cafe.pipeline.train import train_and_evaluate
from cafe.pipeline.workspace import Workspace
from cafe.results.metrics import estimate
from cafe.results.runs import read_runs
from cafe.results.scores import flatten_scores, read_scores


@click.command()
@click.option("--workspace", "-w", default="work", show_default=True)
@click.option("--source", required=True)
@click.option("--targets", required=True, help="Comma-separated, the source among them.")
@click.option("--backbone", default="imagenet-lite0", show_default=True)
@click.option("--views", multiple=True, type=int, default=(1, 2, 4, 8, 16), show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--epochs", default=15, show_default=True, help="15 use every one of 16 views once.")
@click.option("--input-size", default=128, show_default=True, help="Of the tower, pixels.")
@click.option("--image-size", default=32, show_default=True, help="Of the image branch, pixels.")
@click.option("--learning-rate", default=1e-3, show_default=True)
@click.option("--num-cpus", type=int, help="Cores to use; default: all.")
@click.option("--out", required=True, help="Where the table (.md) and the curve (.svg) go, without a suffix.")
def main(
    workspace: str, source: str, targets: str, backbone: str, views: tuple[int, ...], seeds: int, epochs: int,
    input_size: int, image_size: int, learning_rate: float, num_cpus: int | None, out: str,
) -> None:  # fmt: skip
    """Train CAFE from caches of every size and draw accuracy against views."""
    place = Workspace.at(workspace)
    features = ExtractSettings(backbone=backbone, input_size=input_size, num_cpus=num_cpus)
    runs: dict[int, list[dict[str, float]]] = defaultdict(list)
    others = [name for name in targets.split(",") if name != source]
    with cluster.connect(features), no_bar("", "") as progress:
        extract(place, [place.load_manifest(name) for name in others], features, progress)
        # One store serves all: view v is the same however many others there are.
        store = ExtractSettings(**{**vars(features), "views": max(views)})
        extract(place, [place.load_manifest(source)], store, progress)
        for count in views:
            for seed in range(seeds):
                settings = TrainSettings(
                    source=source, method="cafe", seed=seed, backbone=backbone, views=count, epochs=epochs,
                    overrides=(f"learning_rate={learning_rate}",), image_size=image_size, targets=targets,
                    experiment="views", checkpoint_every=epochs,
                )  # fmt: skip
                plan = plan_training(place, settings)
                train_and_evaluate(plan, Mirror(place))
                metrics = flatten_scores(read_scores(read_runs([plan.run])))
                runs[count].append(metrics)
                click.echo(f"{source}, {count} views, seed {seed}: {100 * metrics['unseen/accuracy']:.1f} % unseen")
    curves = {
        name: [estimate([metrics[metric] for metrics in runs[count]]) for count in views]
        for name, metric in (
            ("unseen accuracy", "unseen/accuracy"),
            ("unseen macro-F1", "unseen/macro_f1"),
            ("own test split, accuracy", f"target/{source}/accuracy"),
        )
    }
    lines = [["views", *curves], ["---:"] * (1 + len(curves))]
    lines += [[str(count), *(str(curve[place]) for curve in curves.values())] for place, count in enumerate(views)]
    locate(f"{out}.md").write_text("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        means = [100 * point.mean for point in curve]
        axes.errorbar(views, means, [100 * point.half_width for point in curve], marker="o", capsize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(views, [str(count) for count in views])
    axes.set_xlabel("views in the cache")
    axes.set_ylabel("%")
    axes.set_title(f"CAFE trained on {source}: mean and 95 % t-interval of {seeds} seeds", fontsize=10)
    figure.legend(frameon=False, loc="outside lower center", ncols=3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(f"{out}.svg")


if __name__ == "__main__":
    main()
