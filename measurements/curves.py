"""Training curves of an experiment: accuracy on the training faces by epoch, the mean over seeds, a line for each row.

    python measurements/curves.py --workspace work --experiment ferplus --output docs/curves-ferplus.svg

Read from the records of the epochs in the runs' folders.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import click
import numpy as np
from matplotlib.figure import Figure

from cafe.files import exists, list_folder, read_json
from cafe.pipeline.workspace import Workspace
from cafe.results.comparison import name_rows
from cafe.results.runs import Run

ACCURACY = "train/accuracy"


@click.command()
@click.option("--workspace", default="work", show_default=True)
@click.option("--experiment", required=True)
@click.option("--output", required=True, type=click.Path(path_type=Path))
def main(workspace: str, experiment: str, output: Path) -> None:
    """Draw the curves of finished runs and print the last two epochs of each row."""
    place = Workspace.at(workspace)
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in place.read_runs():
        if experiment in run.experiments and exists(run.folder / "result.json"):
            groups[run.group].append(run)
    names = name_rows(list(groups.values()))
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for number, (name, group) in enumerate(zip(names, groups.values(), strict=True)):
        curves = [[record[ACCURACY] for record in _epochs(run) if ACCURACY in record] for run in group]
        if not all(curves):  # not trained in epochs
            continue
        mean = 100 * np.mean(curves, axis=0)
        axes.plot(range(1, len(mean) + 1), mean, label=name, linestyle=("-", "--", ":")[number // 10])
        print(f"{name}: {mean[-2]:.1f}, {mean[-1]:.1f}")
    axes.set_xlabel("epoch")
    axes.set_ylabel("accuracy on training faces, %")
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(output)


def _epochs(run: Run) -> list[dict[str, float]]:
    return [read_json(path) or {} for path in list_folder(run.folder / "epochs")]


if __name__ == "__main__":
    main()
