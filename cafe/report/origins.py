"""How the numbers of a comparison were made: what each row was trained with, what each target is, and by which versions."""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Sequence
from importlib.metadata import version

from upath import UPath

from cafe import __version__
from cafe.errors import UserError
from cafe.report.sheets.sheet import Sheet, SheetCell
from cafe.results.comparison import Comparison, Row
from cafe.results.leaks import load_leaks
from cafe.results.predictions import Answers
from cafe.results.units import PERCENT
from cafe.results.variants import NEAR, Trial

PACKAGES = ("numpy", "scipy", "pandas")  # that compute what the page shows, with this code
LONG_NUMBER = re.compile(r"\d+\.\d{5,}")
SHORT = 12  # characters of a digest or a commit


def trainings_sheet(comparison: Comparison) -> Sheet:
    """What every row was trained with: a line per row."""
    header = ["source", "method", "seeds", "epoch", "epochs", "tower", "views", "code", "not as published"]
    lines = [list(map(SheetCell, _describe_training(row))) for row in comparison.rows]
    notes = [
        "Epoch: which one is evaluated. final: the last; source_val: the best on faces held out of the source; swad: the "
        "mean of several. Code: the commit or the release a run was trained by. Not as published: settings that differ from "
        "the method's paper, where it has a published recipe. All settings of a run are in its run.json."
    ]
    return Sheet("Trainings", len(header), 1, header, lines, notes)


def draws_sheet(trials: Sequence[Trial], comparison: Comparison) -> Sheet:
    """What each trial of a sweep chose, and how much better that is than its other draws: a line per trial."""
    labels = {run.group: row.label for row in comparison.rows for run in row.runs}
    known = [trial for trial in trials if trial.chosen.group in labels]
    known.sort(
        key=lambda trial: (labels[trial.chosen.group], trial.chosen.fold or trial.chosen.source, trial.chosen.seed)
    )
    lines = [list(map(SheetCell, _describe_trial(trial, labels[trial.chosen.group]))) for trial in known]
    header = ["source", "method", "trial", "draws", "best", "second", "middle", "near", "chosen", "its settings"]
    notes = [
        "Each trial, which is a seed, draws settings of its own and chooses by the accuracy on the faces by which its "
        "epochs are chosen, in percent: of the best draw, the second best and the one in the middle. Near: draws that are "
        f"within {100 * NEAR:.1f} points of the best, itself among them; where these are many, the top is flat. Draw 0: the "
        "settings as they are. The rows of the other tables are means over the trials' choices."
    ]
    return Sheet("Draws", 3, 1, header, lines, notes)


def _describe_trial(trial: Trial, label: str) -> list[str]:
    run, (best, *others) = trial.chosen, trial.accuracies
    accuracies = (best, others[0] if others else math.nan, trial.middle)
    return [
        f"all but {run.fold}" if run.fold else run.source,
        label,
        str(run.seed),
        str(len(trial.runs)),
        *map(PERCENT.write, accuracies),
        str(trial.near),
        f"draw {run.draw}",
        ", ".join(f"{name}={value:.3g}" for name, value in trial.settings.items()),
    ]


def _describe_training(row: Row) -> list[str]:
    first, settings = row.runs[0], row.runs[0].settings
    seeds = dict.fromkeys(str(run.seed) for run in row.runs)
    codes = dict.fromkeys(str(run.derived.get("code", "–")) for run in row.runs)
    return [
        row.source,
        row.label,
        ", ".join(seeds),
        first.selection,
        str(settings.get("recipe.epochs", "–")),
        str(settings.get("backbone", "–")),
        str(settings.get("views", "–")),
        ", ".join(code if " " in code else code[:SHORT] for code in codes),
        LONG_NUMBER.sub(lambda number: f"{float(number[0]):.4g}", ", ".join(first.not_as_published)) or "–",
    ]


def targets_sheet(comparison: Comparison, root: UPath) -> Sheet:
    """What every target is, and how many of its evaluated faces are copies of each source's training faces.

    Copies are those that the audits of the workspace at `root` found.
    """
    scores = comparison.scores
    sources = sorted(
        {(source.name, source.digest) for row in comparison.rows for run in row.runs for source in run.sources}
    )
    header = ["target", "data set", "split", "manifest", "faces", *(f"copies from {name}" for name, _ in sources)]
    lines = []
    for target in comparison.targets:
        own = scores[scores["target"] == target]
        words = (" / ".join(sorted(set(own[name].str[:SHORT]))) for name in ("kind", "split", "manifest"))
        faces = " / ".join(f"{count:,}" for count in sorted(set(own["faces"])))
        runs = {run.name: run for row in comparison.rows for run in row.runs}
        found = comparison.kept.find(runs[own["run"].iloc[0]], comparison.protocol)
        answers = next(one for column, one in found.items() if column.name == target)
        copies = [_count_copies(root, source, answers) for source in sources]
        lines.append(list(map(SheetCell, [target, *words, faces, *copies])))
    notes = [
        "Faces: those that were evaluated. Copies: how many of them cafe data audit found to be copies or near copies of "
        "the source's training faces; --exclude-leaks adds the accuracy without them."
    ]
    return Sheet("Targets and leak audit", 4, 0, header, lines, notes)


def _count_copies(root: UPath, source: tuple[str, str], answers: Answers) -> str:
    try:
        copies = load_leaks(root, *source, answers.about["target"], answers.about["manifest"])
    except UserError:  # there is no audit, or one of other manifests than these
        return "not audited"
    return f"{len(copies.intersection(answers.sample_ids)):,}"


def list_versions() -> str:
    """Return the versions this page is computed with, as a sentence."""
    packages = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    return f"Computed with cafe {__version__}, {packages} and Python {platform.python_version()}."
