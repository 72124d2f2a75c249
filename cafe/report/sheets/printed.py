"""Tables as the paper prints them: the supplement's Table 2 with both of its blocks, and the errors of Sec. 4 by class.

The columns are in the paper's order and the last is the mean over all five sets, the source included. Ours stand above what
was published.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from cafe.report.sheets.sheet import BEST, SECOND, Sheet, SheetCell
from cafe.results.comparison import Comparison, Row
from cafe.results.metrics import RECALL
from cafe.results.published import load_published
from cafe.results.scores import FACES
from cafe.results.sources import SETS

TITLES = {"rafdb": "RAF-DB", "ferplus": "FERPlus", "affectnet": "AffectNet", "sfew": "SFEW2.0", "mma": "MMA"}
METHODS = ("scn", "rul", "eac", "ofer", "cafe")  # in the order of the paper's lines
BLOCKS = {False: "pre-trained", True: "from scratch"}  # whether the image branch starts from scratch
LESS = "less the best rival"
DROP = "drop"
Numbers = Mapping[str, float]  # by method, set or mean


def printed_sheets(comparison: Comparison) -> list[Sheet]:
    """Return Table 2 of the supplement for every set that was trained on, ours and the published one, and the errors."""
    kinds = comparison.kinds
    sheets = []
    for kind in SETS:
        rows = [row for row in comparison.rows if row.contends and [one.kind for one in row.runs[0].sources] == [kind]]
        ours = {scratch: _measure_block(rows, kinds, scratch) for scratch in BLOCKS}
        if any(ours.values()):
            sheets.append(_print_table(f"Trained on {TITLES[kind]}, as the supplement's Table 2", ours))
            theirs = {scratch: _find_published(kind, scratch, list(own)) for scratch, own in ours.items()}
            if any(theirs.values()):
                sheets.append(_print_table(f"Trained on {TITLES[kind]}, as published", theirs))
    return [*sheets, errors_sheet(comparison)]


def _measure_block(rows: Sequence[Row], kinds: Mapping[str, str], scratch: bool) -> dict[str, dict[str, float]]:
    """Return the accuracies by kind of set of the one row of each method whose branch starts so."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if (str(row.runs[0].settings.get("init")) == "scratch") == scratch and row.method not in found:
            cells = ((column, cell) for column, cell in row.cells.items() if not column.leak_free)
            found[row.method] = {kinds[column.name]: cell.mean for column, cell in cells}
    return {method: found[method] for method in (*METHODS, *sorted(found.keys() - {*METHODS})) if method in found}


def _find_published(kind: str, scratch: bool, methods: Sequence[str]) -> dict[str, dict[str, float]]:
    table = load_published()["from_scratch" if scratch else "accuracy"]
    known = {method: table.get(method, {}).get(kind) for method in methods}
    return {
        method: {name: number / 100 for name, number in zip(SETS, numbers, strict=True)}
        for method, numbers in known.items()
        if numbers
    }


def _print_table(title: str, blocks: Mapping[bool, Mapping[str, Numbers]]) -> Sheet:
    lines: list[list[SheetCell]] = []
    means = {scratch: {method: _mean(own) for method, own in block.items()} for scratch, block in blocks.items()}
    for scratch, block in blocks.items():
        whole = {method: {**own, "mean": means[scratch][method]} for method, own in block.items()}
        lines += [_print_line(BLOCKS[scratch], method, whole) for method in whole]
        if "cafe" in whole and len(whole) > 1:
            texts = (
                _points(whole["cafe"].get(place, math.nan) - _best_rival(whole, place)) for place in (*SETS, "mean")
            )
            lines.append(list(map(SheetCell, [BLOCKS[scratch], LESS, *texts])))
    both = [method for method in blocks[True] if method in blocks[False]]
    for method in both:
        drops = [blocks[True][method].get(kind, math.nan) - blocks[False][method].get(kind, math.nan) for kind in SETS]
        drops.append(means[True][method] - means[False][method])
        lines.append([SheetCell(DROP), SheetCell(method), *(SheetCell(_points(drop)) for drop in drops)])
    notes = [
        "Accuracy in percent; mean: of all five sets, the source included, as the paper averages. Underlined: the best "
        f"rival; bold: CAFE, where none is better. {LESS.capitalize()}: CAFE less the underlined."
        + (
            f" {DROP.capitalize()}: what a method loses where its image branch starts from scratch (Sec. 5)."
            if both
            else ""
        )
    ]
    header = ["image branch", "method", *TITLES.values(), "mean"]
    return Sheet(title, 2, 1, header, lines, notes, (len(header) - 1, *range(2, len(header) - 1)))


def _print_line(block: str, method: str, whole: Mapping[str, Numbers]) -> list[SheetCell]:
    cells = [SheetCell(block), SheetCell(method)]
    for place in (*SETS, "mean"):
        value = whole[method].get(place, math.nan)
        best = _best(whole.values(), place)
        rival = method != "cafe" and value == _best_rival(whole, place)
        mark = SECOND if rival else BEST if value == best and len(whole) > 1 else ""
        cells.append(SheetCell("–" if math.isnan(value) else f"{100 * value:.2f}", mark))
    return cells


def _best_rival(whole: Mapping[str, Numbers], place: str) -> float:
    return _best((own for method, own in whole.items() if method != "cafe"), place)


def _best(several: Iterable[Numbers], place: str) -> float:
    values = (own.get(place, math.nan) for own in several)
    return max((value for value in values if not math.isnan(value)), default=math.nan)


def _mean(own: Numbers) -> float:
    """Return the mean over all five sets; NaN where one is missing."""
    return float(np.mean([own.get(kind, math.nan) for kind in SETS]))


def _points(difference: float) -> str:
    return "–" if math.isnan(difference) else f"{100 * difference:+z.2f}".replace("-", "−")


def errors_sheet(comparison: Comparison) -> Sheet:
    """Errors by true class and target (Sec. 4): of each row, how many faces of a class were missed, and which share."""
    scores, columns = comparison.scores, [column for column in comparison.columns if not column.leak_free]
    class_sets, lines = scores["classes"].map(comparison.class_sets), []
    for row in comparison.rows:
        for name in dict.fromkeys(name for run in row.runs for name in run.class_set):
            texts = []
            for column in columns:
                runs = [run.name for run in row.runs if run.evaluates(column)]
                there = (scores["target"] == column.name) & (class_sets == column.class_set)
                here = scores[there & scores["run"].isin(runs)]
                texts.append(_count_errors(here[f"{RECALL}{name}"], here[f"{FACES}{name}"]))
            lines.append(list(map(SheetCell, [row.source, row.label, name, *texts])))
    notes = [
        "Faces of a true class that were taken for another, the mean over seeds: how many of how many, and in brackets the "
        "share of them in percent."
    ]
    header = ["source", "method", "true class", *(column.title for column in columns)]
    return Sheet("Errors by true class and target", 3, 2, header, lines, notes)


def _count_errors(recalls: Sequence[float], faces: Sequence[float]) -> str:
    known = [(recall, count) for recall, count in zip(recalls, faces, strict=True) if count > 0]
    if not known:
        return "–"
    share, count = 1 - float(np.mean([recall for recall, _ in known])), known[0][1]
    return f"{share * count:.0f} of {count:.0f} ({100 * share:.1f})"
