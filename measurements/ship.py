"""Builds the folder of the model that ships, from FERPlus, news and cinema that are indexed in a workspace.

    python measurements/ship.py --workspace work --output cafe/shipped/ferplus-2

Trains `shipped.toml`, evaluates its runs with mirror images, on FERPlus' validation split as well, and exports their average
in half precision. What is done already is not done again; the same faces give the same bytes on one machine. Half an hour on
two quiet cores, most of it the tower's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

TARGETS = "ferplus,news,cinema"
TOWER = "face-resnet#stage2/4x4+stage3/3x3+stage4/3x3"
EXPERIMENT = "shipped"
CARD = Path(__file__).with_name("ship.md")  # what the card says besides


def main() -> None:
    """Build the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", default="work")
    parser.add_argument("--output", default="cafe/shipped/ferplus-2")
    options = parser.parse_args()

    def cafe(*words: str) -> str:
        command = [sys.executable, "-m", "cafe.jobs.cli", "--workspace", options.workspace, *words]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    print(cafe("benchmark", "shipped.toml"))
    names = TARGETS.split(",")
    print(cafe("extract", *names, "--backbone", TOWER, "--input-size", "128", "--views", "2", "--policy", "flip"))
    runs = [run["run"] for run in json.loads(cafe("runs", "--json")) if EXPERIMENT in run["experiments"]]
    for run in runs:
        cafe("evaluate", run, "--targets", "ferplus", "--split", "val", "--test-time", "flip")
        print(cafe("evaluate", run, "--targets", TARGETS, "--test-time", "flip"))
    average = ["--ensemble"] if len(runs) > 1 else []
    form = ["--flip", "--weights", "float16", "--no-graph", "--about", str(CARD), "--output", options.output]
    print(cafe("export", sorted(runs)[0], *average, *form))


if __name__ == "__main__":
    main()
