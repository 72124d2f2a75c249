"""The tables of a comparison: methods × targets, what their numbers rest on, and the notes that some rows need."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

import pandas as pd

from cafe.report.sheets.sheet import (
    BEST,
    CHANCE,
    DOUBTFUL,
    FACES,
    HEAD,
    PEEKED,
    SAW,
    SECOND,
    UNDERLINED,
    Cells,
    Place,
    Sheet,
    SheetCell,
    head_cells,
)
from cafe.results.columns import Column, Mean, name_class_sets
from cafe.results.comparison import NOTHING, Comparison, Row
from cafe.results.metrics import FEW, METRICS, Estimate
from cafe.results.sources import SAME_SET, UNKNOWN, UNSEEN

SAW_NOTE = (
    "Saw target: whether a row learned from pictures of the set that it is evaluated on, or was chosen by their labels."
)
GROUNDS = (
    "Below each source: the faces, and what chance would give: for accuracy the share of the largest class among them, for "
    "macro-F1 and mean-class accuracy one in K classes."
)
ORACLES = (
    "†: the epoch was chosen on the target's own training faces (oracle): what a choice could gain, and no result."
)
TEST_TIME_NOTE = (
    "test_time: more was done than to ask a trained network once; tent, t3a, sar and shot learned from the target's faces, "
    "which is no generalisation to unseen ones. Such rows are neither marked nor ranked."
)


def main_sheet(comparison: Comparison, first: bool = True) -> Sheet:
    """Methods × targets, one block per source, then the means over targets, and how far CAFE is ahead.

    Those that follow the `first` one, of other metrics, are read as it says.
    """
    title = METRICS[comparison.metric].title
    places: list[Place] = [*comparison.columns, *comparison.means]
    higher = {
        place: METRICS[place.metric if isinstance(place, Mean) else comparison.metric].higher_is_better
        for place in places
    }
    lines: list[list[SheetCell]] = []
    for _, block in groupby(comparison.rows, lambda row: row.source):
        rows = list(block)
        cells = [find_cells(row, places) for row in rows]
        marked = mark_lines(rows, cells, higher)
        lines += [[*line, SheetCell(row.saw_target)] for row, line in zip(rows, marked, strict=True)]
        others = (*_lead(rows, cells, higher), *ground_lines(rows[0].source, cells))
        lines += [[*line, SheetCell("")] for line in others]
    shown = {comparison.metric, *(place.metric for place in comparison.means)}
    about = [metric.about for name, metric in METRICS.items() if metric.about and name in shown]
    notes = about if not first else [
        f"{write_units(comparison.metric, shown)}: the mean ± the half-width of the 95 % t-interval over seeds, or both "
        "values where there are two. Unseen: the mean over the targets of other sets than the source; all: with the source, "
        "as published tables average. "
        + " ".join(about),
        *ground_notes(comparison.rows),
        *_target_notes(comparison),
        *class_notes(comparison),
        *row_notes(comparison.rows),
    ]  # fmt: skip
    unseen = [place for place in comparison.means if (place.over, place.metric) == (UNSEEN, comparison.metric)]
    order = [len(HEAD) + places.index(place) for place in dict.fromkeys((*unseen, *places))]
    header = [*HEAD, *(place.title for place in places), SAW]
    return Sheet(title[0].upper() + title[1:], 2, 1, header, lines, notes, (*order, len(header) - 1))


def write_units(metric: str, shown: Collection[str]) -> str:
    """Return the unit of a table's own metric and, in brackets, of others that it shows in another one."""
    own, others = METRICS[metric].unit, dict[str, list[str]]()
    for name, about in METRICS.items():
        if name in shown and about.unit != own:
            others.setdefault(about.unit.name, []).append(about.title)
    said = "; ".join(f"{', '.join(titles)}: {unit}" for unit, titles in others.items())
    return own.name.capitalize() + (f" ({said})" if said else "")


def find_cells(row: Row, places: Sequence[Place]) -> Cells:
    """Return what a row has in some places."""
    return {place: row.means.get(place, NOTHING) if isinstance(place, Mean) else row.cells[place] for place in places}


def mark_lines(rows: Sequence[Row], cells: Sequence[Cells], higher: Mapping[Place, bool]) -> list[list[SheetCell]]:
    """Return the lines of one source's rows with the best and the second best of each column, ties in print sharing it.

    `higher` says where the highest is the best; a row that peeked at the faces it is evaluated on is never marked.
    """
    lines = [_line(row, own) for row, own in zip(rows, cells, strict=True)]
    for number, place in enumerate(cells[0], start=len(HEAD)):
        found = {line: own[place] for line, own in enumerate(cells) if rows[line].contends}
        printed = {line: one.unit.round(one.mean) for line, one in found.items() if not math.isnan(one.mean)}
        order = sorted(set(printed.values()), reverse=higher[place])
        for line, value in printed.items() if len(printed) > 1 else ():
            if value in order[:2]:
                lines[line][number] = replace(lines[line][number], mark=BEST if value == order[0] else SECOND)
    return lines


def _line(row: Row, cells: Cells) -> list[SheetCell]:
    return [*head_cells(row), *(SheetCell(_write(row, place, estimate)) for place, estimate in cells.items())]


def _write(row: Row, place: Place, estimate: Estimate) -> str:
    fewer = row.seeded and 0 < estimate.count < row.seeds
    text = f"{estimate} [{estimate.count}]" if fewer else str(estimate)
    text = f"({text})" if place in row.seen else text
    return text + " †" * row.peeked + " ‡" * estimate.doubtful


def ground_lines(source: str, cells: Sequence[Cells]) -> Iterator[list[SheetCell]]:
    """Yield what the numbers of a block rest on: the faces, and what chance would give."""
    best = [max((own[place] for own in cells), key=lambda estimate: estimate.faces) for place in cells[0]]
    if any(estimate.faces for estimate in best):
        faces = (f"{estimate.faces:,}" if estimate.faces else "–" for estimate in best)
        chances = (estimate.unit.write(estimate.chance) for estimate in best)
        yield list(map(SheetCell, [source, FACES, "", *faces]))
        if not all(math.isnan(estimate.chance) for estimate in best):
            yield list(map(SheetCell, [source, CHANCE, "", *chances]))


def ground_notes(rows: Sequence[Row]) -> Iterator[str]:
    """Yield what chance is, and which numbers are not above it or of few faces."""
    cells: list[tuple[Row, Place, Estimate]] = [
        (row, place, estimate) for row in rows for own in (row.cells, row.means) for place, estimate in own.items()
    ]
    if not any(estimate.faces for *_, estimate in cells):
        return
    yield GROUNDS
    if any(estimate.doubtful for *_, estimate in cells):
        yield DOUBTFUL
    few = {place.title: estimate.faces for _, place, estimate in cells if estimate.doubtful and estimate.few}
    if few:
        yield f"Fewer than {FEW} faces: {', '.join(f'{name} ({count})' for name, count in few.items())}."
    at_chance = {
        f"{row.label} from {row.source}": None
        for row, place, estimate in cells
        if isinstance(place, Mean) and place.over == UNSEEN and estimate.doubtful and estimate.at_chance
    }
    if at_chance:
        yield f"Not above chance in a mean over unseen targets: {', '.join(at_chance)}."


def faces_sheet(comparison: Comparison) -> Sheet | None:
    """Methods × targets with the interval over faces of every mean; None where the metric has none."""
    places: list[Place] = [*comparison.columns, *comparison.means]
    cells = [find_cells(row, places) for row in comparison.rows]
    known = [place for place in places if any(not math.isnan(own[place].low) for own in cells)]
    if not any(isinstance(place, Column) for place in known):
        return None
    lines = [
        [*head_cells(row)[:2], *(SheetCell(own[place].over_faces) for place in known)]
        for row, own in zip(comparison.rows, cells, strict=True)
    ]
    notes = [
        "Percent: the mean over seeds with its 95 % interval over faces (Wilson; macro-F1: delta method; means: targets "
        "combined): what other faces of the same targets would change, where ± above is what other seeds would. Faces are "
        "taken for independent; where a target shows people several times, it is too narrow."
    ]
    unseen = [place for place in known if isinstance(place, Mean) and place.over == UNSEEN]
    order = tuple(2 + known.index(place) for place in dict.fromkeys((*unseen, *known)))
    header = [*HEAD[:2], *(place.title for place in known)]
    return Sheet("Intervals over faces", 2, 1, header, lines, notes, order)


def _lead(rows: Sequence[Row], cells: Sequence[Cells], higher: Mapping[Place, bool]) -> list[list[SheetCell]]:
    """The line of Table 2 of the supplement: CAFE less the best of the other methods; none where CAFE is not one row."""
    fair = [(row, own) for row, own in zip(rows, cells, strict=True) if row.contends]
    ours, rivals = ([own for row, own in fair if (row.method == "cafe") == mine] for mine in (True, False))
    if len(ours) != 1 or not rivals:
        return []
    texts = []
    for place, estimate in ours[0].items():
        means = [own[place].mean for own in rivals if not math.isnan(own[place].mean)]
        best = (max if higher[place] else min)(means, default=math.nan)
        texts.append(estimate.unit.write_difference(estimate.mean - best))
    return [list(map(SheetCell, [rows[0].source, "cafe less the best rival", "", *texts]))]


def _target_notes(comparison: Comparison) -> list[str]:
    notes = []
    if any(row.seen for row in comparison.rows):
        notes.append("In brackets: the test split of the set a row was trained on.")
    if twins := comparison.twins:
        named = ", ".join(f"{name} (as {first})" for name, first in sorted(twins.items()))
        notes.append(f"The same faces under another name, which count once in every mean: {named}.")
    if same := comparison.targets_with(SAME_SET):
        notes.append(f"Not unseen, as another manifest of the source's set: {', '.join(same)}.")
    if unknown := comparison.targets_with(UNKNOWN):
        notes.append(f"Left out, as the workspace has no manifest of that name any more: {', '.join(unknown)}.")
    if comparison.leaking is not None:
        note = "Leak-free: without the copies of the source's training faces that `cafe data audit` found."
        notes.append(note if comparison.leaking else f"{note} It found none.")
    return notes


def class_notes(comparison: Comparison) -> Iterator[str]:
    """Yield which classes the numbers are over, where that is not the same for all, and which faces were left out for it."""
    if len(comparison.class_sets) > 1:
        named = "; ".join(f"{name}: {', '.join(classes)}" for classes, name in comparison.class_sets.items())
        yield f"Predictions over different classes are not comparable and stand in columns of their own. {named}."
    yield from lacking_notes(comparison.scores)
    if any(run.shared_classes for row in comparison.rows for run in row.runs):
        yield "Over the classes that model and target share: the probabilities of others are left out."
    elif any(set(own) - set(theirs) for own, theirs in comparison.scores[["classes", "target_classes"]].to_numpy()):
        yield "Over all classes of a model, also where a target lacks some: --shared-classes leaves those out."


def lacking_notes(scores: pd.DataFrame) -> Iterator[str]:
    """Yield how many faces are left out, of classes that a model does not have."""
    class_sets = name_class_sets(scores["classes"])
    lacking = scores[scores["other_classes"] > 0].drop_duplicates(["target", "classes"])
    said = [
        f"{row.other_classes:,} of {row.target}" + (f" ({name})" if (name := class_sets[row.classes]) else "")
        for row in lacking.itertuples()
    ]
    if said:
        yield f"Faces left out, of a class that the model does not have: {', '.join(said)}."


def row_notes(rows: Sequence[Row]) -> list[str]:
    """Return the notes that some rows need: on the best, peeking, missing or needless seeds, and what the seeds share."""
    several = [row for row in rows if row.seeded and row.seeds > 1]
    fewer = any(0 < e.count < row.seeds for row in several for e in (*row.cells.values(), *row.means.values()))
    one_draw = any(len({run.settings.get("view_seed") for run in row.runs}) == 1 for row in several)
    own_draws = any(row.runs[0].settings.get("views_per_seed") for row in several)
    said = {
        f"For each source, the best is bold and the second {UNDERLINED}, whether or not they differ significantly.":
            len(rows) > len({row.source for row in rows}),
        PEEKED: any(row.peeked and not row.oracle for row in rows),
        ORACLES: any(row.oracle for row in rows),
        TEST_TIME_NOTE: any(row.test_time for row in rows),
        SAW_NOTE: any(row.saw_target != "no" for row in rows),
        "[n]: n seeds, fewer than the row has.": fewer,
        "Seeds: any: every seed predicts the same, because nothing in the method is random.":
            not all(row.seeded for row in rows),
        "The seeds of a row share one draw of views, and the intervals say nothing of other draws.": one_draw,
        "Every seed of a row has a draw of views of its own.": own_draws,
        "All but target: each target is evaluated by a training on all other domains (leave-one-domain-out).":
            any(row.runs[0].fold for row in rows),
    }  # fmt: skip
    return [note for note, holds in said.items() if holds]


def matrix_sheets(comparison: Comparison) -> list[Sheet]:
    """A source × target matrix of each method, where there are several sources."""
    sheets = []
    for label, rows in by_label(comparison):
        header = ["source \\ target", *(column.title for column in comparison.columns), UNSEEN]
        mean = Mean(UNSEEN, comparison.metric)
        whole = [_line(row, {**find_cells(row, comparison.columns), mean: row.unseen}) for row in rows]
        lines = [[line[0], *line[len(HEAD) :]] for line in whole]
        sheets.append(Sheet(f"{label}: every source on every target", 1, 0, header, lines, []))
    return sheets


def by_label(comparison: Comparison) -> list[tuple[str, list[Row]]]:
    """Return the rows of each method over all sources; nothing where there is one source."""
    labels = dict.fromkeys(row.label for row in comparison.rows)
    if len({row.source for row in comparison.rows}) < 2:
        return []
    return [(label, [row for row in comparison.rows if row.label == label]) for label in labels]
