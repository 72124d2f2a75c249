"""What the demo comes to: the accuracy of its methods on every unseen domain and in the mean, with chance, as docs/demo.svg.

    cafe -w work demo
    python measurements/demo.py --workspace work --output docs/demo.svg

Bars are means over seeds; a line is the 95 % interval over seeds, as `cafe compare` prints it.
"""

from __future__ import annotations

from pathlib import Path

import click
import matplotlib as mpl
from matplotlib.figure import Figure

from cafe.pipeline.release.library import compare

METHODS = {"cafe": "#1f5f8b", "linear_probe": "#d9822b", "image_only": "#7a7a7a"}  # and their colours
MEAN = "mean of unseen"
WIDTH = 0.26  # of a bar, where two domains are 1 apart
WARNING = "#b00020"


@click.command()
@click.option("--workspace", default="work", show_default=True)
@click.option("--output", required=True, type=click.Path(path_type=Path))
def main(workspace: str, output: Path) -> None:
    """Draw the bars, and print the numbers that they stand for."""
    table = compare(workspace=workspace, experiment="demo")
    table = table[(table["metric"] == "accuracy") & ((table["role"] == "unseen") | (table["target"] == MEAN))]
    targets = list(dict.fromkeys(table["target"]))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "demo"}):
        figure = Figure(figsize=(6.7, 3), layout="constrained")
        axes = figure.subplots()
        for number, (method, colour) in enumerate(METHODS.items()):
            own = table[table["method"] == method].set_index("target").loc[targets]
            low, high = own["seeds_low"].fillna(own["mean"]), own["seeds_high"].fillna(own["mean"])
            places = [place + (number - 1) * WIDTH for place in range(len(targets))]
            reach = [100 * (own["mean"] - low), 100 * (high - own["mean"])]
            axes.bar(places, 100 * own["mean"], 0.92 * WIDTH, color=colour, label=method)
            axes.errorbar(places, 100 * own["mean"], reach, fmt="none", ecolor="#333333", elinewidth=1, capsize=2)
            print(method, *(f"{target} {100 * mean:.1f}" for target, mean in own["mean"].items()), sep=", ")
        chance = 100 * table["chance"].max()
        axes.axhline(chance, color=WARNING, linestyle="--", linewidth=1)
        axes.set_xlim(-0.5, len(targets) - 0.1)
        beside = len(targets) - 0.12  # the last bar
        axes.text(beside, chance + 1, "chance", color=WARNING, ha="right", fontsize=9)
        axes.set_xticks(range(len(targets)), targets)
        axes.set_ylim(0, 100)
        axes.set_ylabel("accuracy, %")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper center", ncols=len(METHODS), frameon=False)
        figure.savefig(output, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
