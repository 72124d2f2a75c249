"""A comparison's tables in the formats people use: Markdown, LaTeX and CSV; its page is in `experiment`."""

from __future__ import annotations

import html
import re
from collections.abc import Callable

import pandas as pd

from cafe.outputs import MARK, Own, begins, holds
from cafe.report.report import Report, list_records
from cafe.report.sheets.sheet import BEST, SECOND, UNDERLINED, Sheet, SheetCell

MARKDOWN = f"<!-- {MARK} compare -->"  # by which a file is known as ours; no viewer shows it
LATEX_USES = "Needs \\usepackage{booktabs,graphicx}."
WIDE = 8  # columns of a table, more than which LaTeX sets across both columns of a page that has two


def to_markdown(report: Report) -> str:
    """Return the tables with their notes as Markdown; the best bold, the second in italics, as no viewer shows all tags."""
    verdicts = (verdict.text for verdict in report.verdicts)
    parts = [f"# {_escape(report.title)}", *map(_escape, (*verdicts, *report.about))]
    for sheet in report.sheets:
        rule = ["---"] * sheet.words + ["---:"] * (len(sheet.header) - sheet.words)
        lines = [
            list(map(_escape, sheet.header)),
            rule,
            *([_markdown_cell(cell) for cell in line] for line in sheet.lines),
        ]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts += [
            f"## {_escape(sheet.title)}",
            table,
            *(_escape(note).replace(UNDERLINED, "in italics") for note in sheet.notes),
        ]
    return "\n\n".join([*parts, MARKDOWN]) + "\n"


def _markdown_cell(cell: SheetCell) -> str:
    text = _escape(cell.text)
    return {BEST: f"**{text}**", SECOND: f"*{text}*"}.get(cell.mark, text)


def _escape(text: str) -> str:
    """Return text such that nothing in it is a column, a tag or an entity."""
    return re.sub(r"[<&](?=[A-Za-z/!?#])", lambda found: html.escape(found[0]), text).replace("|", "\\|")


def to_csv(report: Report) -> str:
    """Return the records as CSV, a line per row and target; what is not known is empty."""
    records = [{name: _as_text(value) for name, value in record.items()} for record in list_records(report)]
    return str(pd.DataFrame(records, dtype=object).to_csv(index=False, lineterminator="\n"))


def _as_text(value: object) -> object:
    """Return a text such that no spreadsheet takes it for a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def to_latex(report: Report) -> str:
    """Return the tables as floats to include in a document that uses the packages booktabs and graphicx."""
    parts = [f"% {report.title}. {LATEX_USES}", *(f"% {line}" for line in report.about)]
    parts += [f"% {verdict.text}" for verdict in report.verdicts]
    parts += [_latex_table(sheet, number) for number, sheet in enumerate(report.sheets)]
    return "\n\n".join(parts) + "\n"


def _latex_table(sheet: Sheet, number: int) -> str:
    columns = "l" * sheet.words + "r" * (len(sheet.header) - sheet.words)
    lines = []
    for place, line in enumerate(sheet.lines):
        lines += ["\\midrule"] if sheet.starts_block(place) else []
        lines.append(" & ".join(map(_latex_cell, line)) + " \\\\")
    header = " & ".join(map(_escape_latex, sheet.header)) + " \\\\"
    caption = _escape_latex(" ".join([f"{sheet.title}.", *sheet.notes]))
    table = "table*" if len(sheet.header) > WIDE else "table"
    return "\n".join([
        f"\\begin{{{table}}}",
        "\\centering\\footnotesize\\setlength{\\tabcolsep}{3pt}\\setlength{\\belowcaptionskip}{4pt}",
        f"\\caption{{{caption}}}",
        f"\\label{{tab:comparison-{number + 1}}}",
        "\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%  only what is too wide shrinks",
        f"\\begin{{tabular}}{{@{{}}{columns}@{{}}}}",
        "\\toprule", header, "\\midrule", *lines, "\\bottomrule",
        "\\end{tabular}}",
        f"\\end{{{table}}}",
    ])  # fmt: skip


def _latex_cell(cell: SheetCell) -> str:
    text = re.sub(r" ± ([\d.]+)", r"\\,{\\scriptsize$\\pm$\1}", _escape_latex(cell.text, plus_minus=" ± "))
    return {BEST: f"\\textbf{{{text}}}", SECOND: f"\\underline{{{text}}}"}.get(cell.mark, text)


LATEX = {
    "\\": "\\textbackslash{}", "{": "\\{", "}": "\\}", "_": "\\_", "%": "\\%", "&": "\\&", "#": "\\#", "$": "\\$",
    "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "<": "$<$", ">": "$>$", "|": "$|$",
    "−": "$-$", "–": "--", "×": "$\\times$", "†": "\\textdagger{}", "‡": "\\textdaggerdbl{}", "…": "\\dots{}", "±": "$\\pm$",
}  # fmt: skip


def _escape_latex(text: str, plus_minus: str = "") -> str:
    """Return text as LaTeX typesets it; a name in a script it lacks fonts for is the reader's to set up."""
    return "".join(character if character in plus_minus else LATEX.get(character, character) for character in text)


OWN: dict[str, Own] = {  # what knows a file of ours, by its format
    "markdown": holds(MARKDOWN),
    "latex": holds(LATEX_USES),
    "csv": begins("protocol,source,method,row,selection,seeds,"),
}
FORMATS: dict[str, Callable[[Report], str]] = {
    "markdown": to_markdown,
    "latex": to_latex,
    "csv": to_csv,
}
