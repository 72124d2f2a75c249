"""The tables about single runs: one's numbers by target, and what the trials of a sweep chose."""

from __future__ import annotations

import math

import pandas as pd

from cafe.report.sheets.comparison import lacking_notes
from cafe.report.sheets.sheet import DOUBTFUL, FACES, Sheet, SheetCell
from cafe.results.metrics import METRICS, OF_VOTES, is_doubtful
from cafe.results.scores import average_unseen, interval_of_mean
from cafe.results.sources import SAME_FACES, UNSEEN
from cafe.results.units import PERCENT

RUN_GROUNDS = (
    "Over faces: the 95 % interval of the accuracy (Wilson; faces taken for independent). Chance: the share of the largest "
    "class for accuracy, 1/K for macro-F1 and mean-class accuracy."
)
MEAN_LINE = "mean of unseen"


def run_sheet(scores: pd.DataFrame, leak_free: pd.DataFrame | None = None) -> Sheet:
    """One run's numbers by one protocol: a line per target and the mean over the unseen ones; leak-free beside them."""
    numbers = _with_mean(scores)
    table = pd.DataFrame({METRICS[name].heading: numbers[name].map(METRICS[name].unit.write) for name in numbers})
    grounds = _ground(scores)
    table.insert(0, FACES, [f"{count:,}" for count in grounds["faces"]])
    table.insert(2, "over faces", [_interval(*ends) for ends in zip(grounds["low"], grounds["high"], strict=True)])
    table.insert(3, "largest class", grounds["largest"].map(PERCENT.write).tolist())
    table.insert(4, "1/K", grounds["uniform"].map(PERCENT.write).tolist())
    doubts = {name: is_doubtful(own["low"], own["largest"], own["faces"]) for name, own in grounds.iterrows()}
    table["accuracy"] += [" ‡" * doubts[name] for name in table.index]
    if leak_free is not None:
        table["leak-free accuracy"] = _with_mean(leak_free)["accuracy"].map(PERCENT.write)
        table["left out"] = leak_free.set_index("target")["left_out"].map("{:,}".format)
    lines = [list(map(SheetCell, line)) for line in table.fillna("").reset_index().to_numpy()]
    order = [1 + table.columns.get_loc(name) for name in ("accuracy", "largest class", FACES, "over faces")]
    notes = [RUN_GROUNDS, *lacking_notes(scores), *([DOUBTFUL] if any(doubts.values()) else [])]
    twins = scores.loc[scores["relation"] == SAME_FACES, "target"]
    notes += (
        [f"The same faces under another name, not counted in the mean again: {', '.join(twins)}."] if len(twins) else []
    )
    return Sheet("Percent where no other unit is named", 1, 0, ["target", *table.columns], lines, notes, tuple(order))


def _with_mean(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the metrics by target, and below them their means over the unseen targets where there are any."""
    unseen = average_unseen(scores)
    table = pd.concat([scores.set_index("target")[list(METRICS)], unseen.set_axis([MEAN_LINE] * len(unseen))])
    return table[[name for name in METRICS if name not in OF_VOTES or table[name].notna().any()]]


def _ground(scores: pd.DataFrame) -> pd.DataFrame:
    """Return by target what its accuracy rests on: faces, chance, and the ends of its interval; the mean's below."""
    columns = {"accuracy.low": "low", "accuracy.high": "high"}
    table = scores.set_index("target")[["faces", "largest", "uniform", *columns]].rename(columns=columns)
    unseen = scores[scores["relation"] == UNSEEN]
    if len(unseen):
        low, high = interval_of_mean(unseen, "accuracy")
        chance = (unseen["largest"].mean(), unseen["uniform"].mean())
        table.loc[MEAN_LINE] = [unseen["faces"].sum(), *chance, low, high]
    return table.astype({"faces": int})


def _interval(low: float, high: float) -> str:
    return "–" if math.isnan(low) else f"{PERCENT.write(low)}–{PERCENT.write(high)}"
