"""The tables of accuracy by a column of the targets' manifests: every group, the worst, and the gap with its test."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from cafe.report.sheets.sheet import BEST, FACES, HEAD, PEEKED, SAW, Sheet, SheetCell, head_cells, write_p
from cafe.results.groups import Parted, Parting
from cafe.results.metrics import FEW
from cafe.results.significance.homogeneity import Share
from cafe.results.units import PERCENT

PARTED = (
    "Accuracy in percent, the mean over seeds, with its 95 % interval over faces (Wilson), or over as many as are effective "
    "where faces belong to persons. Gap: the best group less the worst, in points; its 95 % interval holds for all pairs of "
    "groups at once (Agresti and others, 2008), so for these two as well. p: a permutation test that all groups are alike, "
    "in which persons stay whole; p (Holm) is corrected over a row's targets. Bold: p (Holm) is below 0.05. A gap says "
    "nothing of its cause: groups may differ in expressions and pictures, too."
)


def groups_sheets(parting: Parting) -> list[Sheet]:
    """A sheet for each target, its lines the rows and its columns the groups; the first says how to read them."""
    by_target = sorted(parting.parts, key=lambda part: part.column)
    sheets: list[Sheet] = []
    for column, found in groupby(by_target, lambda part: part.column):
        own = list(found)
        groups = list(dict.fromkeys(group for part in own for group in part.groups))
        header = [*HEAD[:2], *groups, "worst", "gap", "95 % interval", "p", "p (Holm)", SAW]
        lines = []
        for source, block in groupby(own, lambda part: part.row.source):
            several = list(block)
            lines += [_line(part, groups) for part in several]
            faces = _by_group(several[0])
            counts = [f"{faces[group].faces:,}" if group in faces else "–" for group in groups]
            lines.append([SheetCell(text) for text in (source, FACES, *counts, *[""] * 6)])
        place = len(groups) + len(HEAD[:2])
        order = (place + 1, place, place + 4, place + 2, place + 3, *range(2, place), place + 5)
        notes = [*([] if sheets else [PARTED]), *_notes(own, parting.by)]
        sheets.append(Sheet(f"{column.title} by {parting.by}", 2, 1, header, lines, notes, order))
    if parting.lacking:
        why = "; ".join(f"{target} ({reason})" for target, reason in sorted(parting.lacking.items()))
        sheets[-1].notes.append(f"Not parted by {parting.by}: {why}.")
    return sheets


def _by_group(part: Parted) -> dict[str, Share]:
    return dict(zip(part.groups, part.shares, strict=True))


def _line(part: Parted, groups: Sequence[str]) -> list[SheetCell]:
    shares, gap = _by_group(part), part.gap
    name = head_cells(part.row)[1].text
    cells = [SheetCell(part.row.source), SheetCell(f"{name} †" if part.row.peeked else name)]
    cells += [SheetCell(_write(shares[group]) if group in shares else "–") for group in groups]
    if gap is None:
        return [*cells, *(SheetCell("–") for _ in range(5)), SheetCell(part.row.saw_target)]
    return [
        *cells,
        SheetCell(part.groups[gap.worst]),
        SheetCell(PERCENT.write_difference(gap.mean), BEST if part.adjusted_p < 0.05 else ""),
        SheetCell(f"{PERCENT.write_difference(gap.low)} to {PERCENT.write_difference(gap.high)}"),
        SheetCell(write_p(gap.p)),
        SheetCell(write_p(part.adjusted_p)),
        SheetCell(part.row.saw_target),
    ]


def _write(share: Share) -> str:
    return f"{PERCENT.write(share.mean)} ({PERCENT.write(share.low)}–{PERCENT.write(share.high)})"


def _notes(own: Sequence[Parted], by: str) -> list[str]:
    few = [f"{group} ({share.faces})" for group, share in _by_group(own[0]).items() if share.faces < FEW]
    said = {
        f"Fewer than {FEW} faces: {', '.join(few)}.": bool(few),
        f"Left out, as their {by} is not known: {own[0].unknown:,} faces.": own[0].unknown > 0,
        f"All faces are of one {by}, so that there is nothing to compare.": own[0].gap is None,
        PEEKED: any(part.row.peeked for part in own),
    }
    return [note for note, holds in said.items() if holds]
