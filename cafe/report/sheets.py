"""The tables of a comparison as cells of text; how they look in each output is in `cafe.report.formats`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import pandas as pd

from cafe.results.columns import Column, Mean, name_class_sets
from cafe.results.comparison import NOTHING, Comparison, Row
from cafe.results.metrics import FEW, METRICS, OF_VOTES, Estimate
from cafe.results.published import Published
from cafe.results.scores import average_unseen, interval_of_mean
from cafe.results.significance.paired_tests import PAIRS, RECALLS, Paired, Ranks
from cafe.results.sources import SAME_FACES, SAME_SET, UNKNOWN, UNSEEN

Place = Column | Mean
Cells = dict[Place, Estimate]  # of one line

BEST, SECOND = "best", "second"
UNDERLINED = "underlined"  # how the second is shown, which not every format can
HEAD = ["source", "method", "seeds"]  # of the tables with a line for each row of a comparison
SAW = "saw target"  # the last column of every table with a line for each row
SAW_NOTE = (
    "Saw target: whether a row learned from pictures of the set that it is evaluated on, or was chosen by their labels."
)
NOISE = (
    "Published numbers are single runs; the choice of their test faces alone moves them by ±3.3 (SFEW), ±1.7 (AffectNet), "
    "±1.5 (FERPlus), ±1.1 (RAF-DB) or ±0.7 (MMA) points (95 %)."
)
FACES, CHANCE = "faces", "chance"  # the lines that end a block
GROUNDS = (
    "Below each source: the faces, and what chance would give: for accuracy the share of the largest class among them, for "
    "macro-F1 and mean-class accuracy one in K classes."
)
RUN_GROUNDS = (
    "Over faces: the 95 % interval of the accuracy (Wilson; faces taken for independent). Chance: the share of the largest "
    "class for accuracy, 1/K for macro-F1 and mean-class accuracy."
)
MEAN_LINE = "mean of unseen"
DOUBTFUL = (
    "‡: other faces might as well have shown nothing above chance (95 % over faces, taken for independent), or there are "
    f"fewer than {FEW}."
)
PEEKED = "†: the epoch was chosen on the source's test split, as RUL's and OFER's scripts do: not comparable."
ORACLES = (
    "†: the epoch was chosen on the target's own training faces (oracle): what a choice could gain, and no result."
)
TEST_TIME_NOTE = (
    "test_time: more was done than to ask a trained network once; tent, t3a, sar and shot learned from the target's faces, "
    "which is no generalisation to unseen ones. Such rows are neither marked nor ranked."
)


@dataclass(frozen=True)
class SheetCell:
    """What is written in a table, and whether it is the best or the second best of its column."""

    text: str
    mark: str = ""


@dataclass(frozen=True)
class Sheet:
    """A table: the first `words` columns are words, the others numbers; notes say how to read it.

    Lines whose first `block` columns agree belong together. `order` holds the columns behind the words by importance, for a
    screen that has no room for all.
    """

    title: str
    words: int
    block: int
    header: list[str]
    lines: list[list[SheetCell]]
    notes: list[str]
    order: tuple[int, ...] = ()

    @property
    def shown(self) -> list[int]:
        """Its columns as a page shows them, where the most important one stands behind the words and stays in view."""
        first = [*range(self.words), *self.order[:1]]
        return [*first, *(column for column in range(len(self.header)) if column not in first)]

    def starts_block(self, number: int) -> bool:
        """Whether a line does not belong with the line before."""
        return 0 < number < len(self.lines) and self.lines[number][: self.block] != self.lines[number - 1][: self.block]


def main_sheet(comparison: Comparison) -> Sheet:
    """Methods × targets, one block per source, then the means over targets, and how far CAFE is ahead."""
    title = METRICS[comparison.metric].title
    places: list[Place] = [*comparison.columns, *comparison.means]
    higher = {
        place: METRICS[place.metric if isinstance(place, Mean) else comparison.metric].higher_is_better
        for place in places
    }
    lines: list[list[SheetCell]] = []
    for _, block in groupby(comparison.rows, lambda row: row.source):
        rows = list(block)
        cells = [_find_cells(row, places) for row in rows]
        marked = _mark_lines(rows, cells, higher)
        lines += [[*line, SheetCell(row.saw_target)] for row, line in zip(rows, marked, strict=True)]
        others = (*_lead(rows, cells, higher), *_grounds(rows[0].source, cells))
        lines += [[*line, SheetCell("")] for line in others]
    about = [
        metric.about
        for name, metric in METRICS.items()
        if metric.about and (metric.beside or name == comparison.metric)
    ]
    notes = [
        "Percent: the mean ± the half-width of the 95 % t-interval over seeds, or both values where there are two. Unseen: "
        "the mean over the targets of other sets than the source; all: with the source, as published tables average. "
        + " ".join(about),
        *ground_notes(comparison.rows),
        *_target_notes(comparison),
        *class_notes(comparison),
        *row_notes(comparison.rows),
    ]
    unseen = [place for place in comparison.means if (place.over, place.metric) == (UNSEEN, comparison.metric)]
    order = [len(HEAD) + places.index(place) for place in dict.fromkeys((*unseen, *places))]
    header = [*HEAD, *(place.title for place in places), SAW]
    return Sheet(title[0].upper() + title[1:], 2, 1, header, lines, notes, (*order, len(header) - 1))


def _find_cells(row: Row, places: Sequence[Place]) -> Cells:
    return {place: row.means.get(place, NOTHING) if isinstance(place, Mean) else row.cells[place] for place in places}


def _mark_lines(rows: Sequence[Row], cells: Sequence[Cells], higher: Mapping[Place, bool]) -> list[list[SheetCell]]:
    """Return the lines of one source's rows with the best and the second best of each column, ties in print sharing it.

    `higher` says where the highest is the best; a row that peeked at the faces it is evaluated on is never marked.
    """
    lines = [_line(row, own) for row, own in zip(rows, cells, strict=True)]
    for number, place in enumerate(cells[0], start=len(HEAD)):
        means = {line: own[place].mean for line, own in enumerate(cells) if rows[line].contends}
        printed = {line: round(100 * mean, 1) for line, mean in means.items() if not math.isnan(mean)}
        order = sorted(set(printed.values()), reverse=higher[place])
        for line, value in printed.items() if len(printed) > 1 else ():
            if value in order[:2]:
                lines[line][number] = replace(lines[line][number], mark=BEST if value == order[0] else SECOND)
    return lines


def _line(row: Row, cells: Cells) -> list[SheetCell]:
    return [*_head(row), *(SheetCell(_write(row, place, estimate)) for place, estimate in cells.items())]


def _head(row: Row) -> list[SheetCell]:
    return [SheetCell(row.source), SheetCell(row.label), SheetCell(str(row.seeds) if row.seeded else "any")]


def _write(row: Row, place: Place, estimate: Estimate) -> str:
    fewer = row.seeded and 0 < estimate.count < row.seeds
    text = f"{estimate} [{estimate.count}]" if fewer else str(estimate)
    text = f"({text})" if place in row.seen else text
    return text + " †" * row.peeked + " ‡" * is_doubtful(estimate)


def is_doubtful(estimate: Estimate) -> bool:
    """Whether a number that can be compared with chance is not above it, or of too few faces to say."""
    return not math.isnan(estimate.chance) and (estimate.at_chance or estimate.few)


def _grounds(source: str, cells: Sequence[Cells]) -> Iterator[list[SheetCell]]:
    """Yield what the numbers of a block rest on: the faces, and what chance would give."""
    best = [max((own[place] for own in cells), key=lambda estimate: estimate.faces) for place in cells[0]]
    if any(estimate.faces for estimate in best):
        faces = (f"{estimate.faces:,}" if estimate.faces else "–" for estimate in best)
        chances = ("–" if math.isnan(estimate.chance) else f"{100 * estimate.chance:.1f}" for estimate in best)
        yield list(map(SheetCell, [source, FACES, "", *faces]))
        yield list(map(SheetCell, [source, CHANCE, "", *chances]))


def ground_notes(rows: Sequence[Row]) -> Iterator[str]:
    """Yield what chance is, and which numbers are not above it or of few faces."""
    cells: list[tuple[Row, Place, Estimate]] = [
        (row, place, estimate) for row in rows for own in (row.cells, row.means) for place, estimate in own.items()
    ]
    if not any(estimate.faces for *_, estimate in cells):
        return
    yield GROUNDS
    if any(is_doubtful(estimate) for *_, estimate in cells):
        yield DOUBTFUL
    few = {place.title: estimate.faces for _, place, estimate in cells if is_doubtful(estimate) and estimate.few}
    if few:
        yield f"Fewer than {FEW} faces: {', '.join(f'{name} ({count})' for name, count in few.items())}."
    at_chance = {
        f"{row.label} from {row.source}": None
        for row, place, estimate in cells
        if isinstance(place, Mean) and place.over == UNSEEN and is_doubtful(estimate) and estimate.at_chance
    }
    if at_chance:
        yield f"Not above chance in a mean over unseen targets: {', '.join(at_chance)}."


def faces_sheet(comparison: Comparison) -> Sheet | None:
    """Methods × targets with the interval over faces of every mean; None where the metric has none."""
    places: list[Place] = [*comparison.columns, *comparison.means]
    cells = [_find_cells(row, places) for row in comparison.rows]
    known = [place for place in places if any(not math.isnan(own[place].low) for own in cells)]
    if not any(isinstance(place, Column) for place in known):
        return None
    lines = [
        [*_head(row)[:2], *(SheetCell(own[place].over_faces) for place in known)]
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
        texts.append("–" if math.isnan(estimate.mean - best) else points(estimate.mean - best))
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
    yield from _lacking_notes(comparison.scores)
    if any(run.shared_classes for row in comparison.rows for run in row.runs):
        yield "Over the classes that model and target share: the probabilities of others are left out."
    elif any(set(own) - set(theirs) for own, theirs in comparison.scores[["classes", "target_classes"]].to_numpy()):
        yield "Over all classes of a model, also where a target lacks some: --shared-classes leaves those out."


def _lacking_notes(scores: pd.DataFrame) -> Iterator[str]:
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
        whole = [_line(row, {**_find_cells(row, comparison.columns), mean: row.unseen}) for row in rows]
        lines = [[line[0], *line[len(HEAD) :]] for line in whole]
        sheets.append(Sheet(f"{label}: every source on every target", 1, 0, header, lines, []))
    return sheets


def by_label(comparison: Comparison) -> list[tuple[str, list[Row]]]:
    """Return the rows of each method over all sources; nothing where there is one source."""
    labels = dict.fromkeys(row.label for row in comparison.rows)
    if len({row.source for row in comparison.rows}) < 2:
        return []
    return [(label, [row for row in comparison.rows if row.label == label]) for label in labels]


def published_sheet(comparison: Comparison, published: Sequence[Published | None]) -> Sheet:
    """How far each row is from the numbers published for its method, and which of its settings differ."""
    lines: list[list[SheetCell]] = []
    differing: dict[str, list[str]] = {}
    for row, numbers in zip(comparison.rows, published, strict=True):
        if numbers:
            pairs = [(row.cells[column].mean, numbers.cells.get(column, math.nan)) for column in comparison.columns]
            pairs += [(row.unseen.mean, numbers.unseen), (row.everything.mean, numbers.everything)]
            lines.append([*_head(row), *(SheetCell(_beside(row, *pair)) for pair in pairs), SheetCell(row.saw_target)])
            if settings := row.runs[0].not_as_published:
                differing.setdefault(", ".join(settings), []).append(f"{row.label} from {row.source}")
    notes = [
        "Our accuracy minus the published one, which is in brackets, in percentage points. Only where this protocol "
        f"takes the data set as the released test readers do. {NOISE}",
        *(f"Not as published: {settings} ({'; '.join(rows)})." for settings, rows in differing.items()),
    ]
    titles = (column.title for column in comparison.columns)
    header = [*HEAD, *titles, "unseen accuracy", "all accuracy", SAW]
    return Sheet("Beside the published numbers", 2, 1, header, lines, notes)


def _beside(row: Row, ours: float, published: float) -> str:
    unknown = math.isnan(ours) or math.isnan(published)
    text = "–" if unknown else f"{points(ours - published)} ({100 * published:.1f})"
    return f"{text} †" if row.peeked else text


def points(difference: float) -> str:
    """Return a difference of fractions in percentage points with its sign."""
    return f"{100 * difference:+.1f}".replace("-", "−")


TESTED = (
    "Accuracy minus that of the reference, in percentage points. The interval and p measure what other faces would change, "
    "not other seeds: a bootstrap over faces, each with all seeds of both methods; where faces belong to groups (a person, "
    "a film), a jackknife over groups with Student's t. p (Holm) is corrected over a row's targets or expressions. "
    "Seeds apart: every seed of one method is ahead of every seed of the other. Bold: p (Holm), or p for the mean, is below "
    "0.05, and the seeds are not mixed."
)


def tests_sheets(tests: list[Paired]) -> list[Sheet]:
    """The paired tests, a line per method and target and a sheet per source; the first says how to read them."""
    sheets: list[Sheet] = []
    for source, block in groupby(tests, lambda test: test.row.source):
        own = list(block)
        what = "expression" if own[0].mean == RECALLS else "target"
        header = ["method", what, "faces", "difference", "95 % interval", "p", "p (Holm)", "seeds apart", SAW]
        notes = [*([] if sheets else [TESTED]), *([PEEKED] if any(test.peeked for test in own) else [])]
        if incomplete := [test for test in own if test.left_out and test.column]:
            missing = (f"{test.left_out:,} of {test.title} ({test.row.label})" for test in incomplete)
            notes.append(f"Tested on the faces all runs have evaluated, without {', '.join(missing)}.")
        title = f"Against {own[0].reference.label}, trained on {source}"
        lines = [_test_line(test) for test in own]
        sheets.append(Sheet(title, 2, 1, header, lines, notes, order=(3, 4, 6, 5, 7, 2)))
    return sheets


def _test_line(test: Paired) -> list[SheetCell]:
    difference = test.difference
    groups = f" in {difference.groups:,} groups" if difference.groups and test.column else ""
    return [
        SheetCell(f"{test.row.label} †" if test.peeked else test.row.label),
        SheetCell(name_target(test)),
        SheetCell(f"{difference.faces:,}{groups}"),
        SheetCell(points(difference.mean), BEST if test.holds else ""),
        SheetCell(f"{points(difference.low)} to {points(difference.high)}"),
        SheetCell(_p(difference.p)),
        SheetCell(_p(test.adjusted_p) if test.column else "–"),
        SheetCell("–" if test.apart is None else "yes" if test.apart else "no"),
        SheetCell(test.row.saw_target),
    ]


def name_target(test: Paired) -> str:
    """Return the name of a test's target or class, in brackets where the row was trained on that set."""
    return f"({test.title})" if test.column in test.row.seen else test.title


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def ranks_sheet(ranks: Ranks, comparison: Comparison) -> Sheet:
    """Mean ranks over targets with Friedman's and Nemenyi's tests."""
    ranking = ranks.ranking
    lines = [
        [SheetCell(label), SheetCell(f"{place:.2f}")] for label, place in zip(ranks.labels, ranking.ranks, strict=True)
    ]
    notes = [f"By {METRICS[comparison.metric].title} over {ranking.targets} pairs of source and unseen target."]
    if not math.isnan(ranking.p):
        notes.append(f"Friedman's test: p = {_p(ranking.p)}.".replace("= <", "< "))
    notes.append(
        f"Fewer than three methods or {PAIRS} pairs: no critical difference and no diagram."
        if math.isnan(ranking.p)
        else "The ranks cannot differ by as much as a critical difference."
        if math.isnan(ranking.critical_difference)
        else f"Nemenyi's critical difference of two mean ranks (5 %): {ranking.critical_difference:.2f}. Pairs that share a "
        "source or a target are not independent, so take it as a guide."
    )
    if ranks.left_out:
        notes.append(f"Not ranked, as not trained on every source or not comparable: {', '.join(ranks.left_out)}.")
    return Sheet("Mean ranks", 1, 0, ["method", "mean rank"], lines, notes)


def class_sheet(comparison: Comparison, target: str, published: Sequence[Published | None]) -> Sheet:
    """Recall per expression on one target, and below each row how far it is from the published numbers."""
    lines: list[list[SheetCell]] = []
    for _, block in groupby(zip(comparison.rows, published, strict=True), lambda pair: pair[0].source):
        rows, known = zip(*block, strict=True)
        marked = _mark_lines(
            rows, [_find_cells(row, comparison.columns) for row in rows], dict.fromkeys(comparison.columns, True)
        )
        for row, numbers, line in zip(rows, known, marked, strict=True):
            lines.append([*line, SheetCell(row.saw_target)])
            if numbers:
                pairs = ((own.mean, numbers.cells.get(column, math.nan)) for column, own in row.cells.items())
                texts = [_beside(row, *pair) for pair in pairs]
                lines.append(list(map(SheetCell, [row.source, f"{row.label} − published", "", *texts, ""])))
    notes = [
        f"Recall per expression on {target} in percent: the mean ± the half-width of the 95 % t-interval over seeds, or "
        "both values where there are two; overall: accuracy; mean: of the recalls. In brackets: trained on the same set.",
        *class_notes(comparison),
        *row_notes(comparison.rows),
        *([f"− published: minus the published numbers, which are in brackets. {NOISE}"] if any(published) else []),
    ]
    header = [*HEAD, *(column.title for column in comparison.columns), SAW]
    return Sheet(f"Expressions on {target}", 2, 1, header, lines, notes)


def run_sheet(scores: pd.DataFrame, leak_free: pd.DataFrame | None = None) -> Sheet:
    """One run's numbers by one protocol: a line per target and the mean over the unseen ones; leak-free beside them."""
    numbers = _with_mean(scores)
    table = numbers.rename(columns={name: metric.title for name, metric in METRICS.items()}).map(_percent)
    grounds = _ground(scores)
    table.insert(0, FACES, [f"{count:,}" for count in grounds["faces"]])
    table.insert(2, "over faces", [_interval(*ends) for ends in zip(grounds["low"], grounds["high"], strict=True)])
    table.insert(3, "largest class", grounds["largest"].map(_percent).tolist())
    table.insert(4, "1/K", grounds["uniform"].map(_percent).tolist())
    doubts = {name: own["low"] <= own["largest"] or own["faces"] < FEW for name, own in grounds.iterrows()}
    table["accuracy"] += [" ‡" * bool(doubts[name]) for name in table.index]
    if leak_free is not None:
        table["leak-free accuracy"] = _with_mean(leak_free)["accuracy"].map(_percent)
        table["left out"] = leak_free.set_index("target")["left_out"].map("{:,}".format)
    lines = [list(map(SheetCell, line)) for line in table.fillna("").reset_index().to_numpy()]
    order = [1 + table.columns.get_loc(name) for name in ("accuracy", "largest class", FACES, "over faces")]
    notes = [RUN_GROUNDS, *_lacking_notes(scores), *([DOUBTFUL] if any(doubts.values()) else [])]
    twins = scores.loc[scores["relation"] == SAME_FACES, "target"]
    notes += (
        [f"The same faces under another name, not counted in the mean again: {', '.join(twins)}."] if len(twins) else []
    )
    return Sheet("Percent", 1, 0, ["target", *table.columns], lines, notes, tuple(order))


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
    return "–" if math.isnan(low) else f"{100 * low:.1f}–{100 * high:.1f}"


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.1f}"
