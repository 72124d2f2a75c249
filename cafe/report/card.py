"""The model card of exported runs: what it is for, what it is not, what it was made of, and how well it does where.

"Model Cards for Model Reporting", Mitchell et al., FAT* 2019. Every number is computed from the run's predictions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from cafe.data import alignment
from cafe.report.pages import render
from cafe.results.metrics import METRICS, confusion, estimate, is_doubtful, risk_at
from cafe.results.predictions import Predictions
from cafe.results.protocols import ALL_PROTOCOLS, PROTOCOLS, find_protocol
from cafe.results.runs import Run
from cafe.results.scores import average_unseen, describe_left_out, meet, read_scores
from cafe.results.significance.statistics import combine_intervals, wilson
from cafe.results.sources import UNSEEN
from cafe.results.units import PERCENT
from cafe.results.variants import average_exported
from cafe.towers.names import split_name

COVERAGES = (0.8, 0.6, 0.4)
MEASURED = ("macro_f1", "worst_class_recall", "auroc", "nll", "brier", "ece", "aurc")  # beside accuracy and recalls
TOWERS = {
    "face-resnet": "dlib's face network: public domain (CC0); trained on three million faces collected from the internet",
    "imagenet-lite0": "EfficientNet-Lite0: Apache-2.0; trained on ImageNet, whose pictures are for non-commercial research",
    "clip-vit-b32": "OpenAI's CLIP ViT-B/32: MIT; by OpenAI's card not for deployed uses that were not tested",
    "none": "no frozen tower",
}
DATA = {
    "rafdb": "RAF-DB: non-commercial research only, on request",
    "ferplus": "FERPlus: the votes under the MIT licence; the pictures are FER-2013's, see where you got them",
    "ferplus-argmax": "FERPlus: the votes under the MIT licence; the pictures are FER-2013's, see where you got them",
    "fer2013": "FER-2013: see where you got it",
    "ckplus": "CK+: research only, on request",
    "expw": "ExpW: research only, see where you got it",
    "jaffe": "JAFFE: non-commercial research only, on request",
    "kdef": "KDEF: non-commercial research only, on request",
    "affectnet": "AffectNet: research only, by a signed agreement",
    "sfew": "SFEW 2.0: academic research only, on request",
    "mma": "MMA: see where you got it",
    "synthetic": "drawn by this project: Apache-2.0",
}


def write_card(
    runs: Sequence[Run], seeds: Sequence[Run], known: Mapping[str, str], record: dict[str, Any], about: str = ""
) -> bytes:
    """Return the card of a run, or of several that are averaged, in Markdown.

    `seeds` are the runs that differ from it in nothing but their seed, `known` the digests of the workspace's manifests by
    name, `record` is what `model.json` will hold, `about` what the card says besides, in Markdown.
    """
    mirrored = record["averaged"]["mirror_images"]
    chosen, met = meet(runs, known), meet(seeds, known)
    run, evaluated_mirrored = average_exported(chosen.runs, mirrored)
    scores = read_scores([run], known, tuple(PROTOCOLS) if evaluated_mirrored else ALL_PROTOCOLS)
    tower = split_name(run.settings.get("backbone") or "none")[0]
    tables = {
        name: list(list_domains(run, name, scores)) for name in ALL_PROTOCOLS if (scores["protocol"] == name).any()
    }
    averaged = describe_average(len(runs), evaluated_mirrored)
    return render(
        "card.md",
        run=run,
        record=record,
        about=about,
        tower=TOWERS.get(tower, f"{tower}: see its authors' card"),
        data=[
            DATA.get(source.kind, f"{source.name}: your own; what may be done with it holds for this model too")
            for source in run.sources
        ],
        classes=run.classes,
        tables=tables,
        evaluated=averaged[:1].upper() + averaged[1:] if averaged else "This run",
        not_mirrored=mirrored and not evaluated_mirrored,
        unseen=describe_unseen(scores, averaged) if averaged else describe_seeds(met.runs, known),
        left_out=describe_left_out(list(dict.fromkeys([*chosen.left_out, *met.left_out]))),
        average=describe_average(len(runs), mirrored),
        measured={METRICS[name].heading: METRICS[name].about for name in MEASURED},
        coverages=[f"{share:.0%}" for share in COVERAGES],
        protocols={name: find_protocol(name).about for name in tables},
        crop={
            "size": alignment.SIDE,
            "eye_height": alignment.EYE_HEIGHT,
            "eye_distance": alignment.EYE_DISTANCE,
            "eyes_to_mouth": alignment.EYES_TO_MOUTH,
            "finest": alignment.FINEST,
        },
    )


def describe_average(seeds: int, mirrored: bool) -> str:
    """Return what a model averages, in words; nothing for one that averages nothing."""
    of_seeds = f"the mean of {seeds} seeds" if seeds > 1 else ""
    of_images = "the mean over each face and its mirror image" if mirrored else ""
    return ", ".join(filter(None, (of_seeds, of_images)))


def list_domains(run: Run, protocol: str, scores: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield for each target its name, what it is to the run, faces, and the shares of them that were recognised."""
    relations = scores[scores["protocol"] == protocol].set_index("target")["relation"]
    for column, predictions in run.load_predictions(protocol, named=False).items():
        target = column.name
        yield {"name": target, "relation": relations[target], **count_right(predictions)}


def count_right(predictions: Predictions) -> dict[str, Any]:
    """Return faces and the accuracy with its interval, and the same of every class, as they are printed.

    Beside them the share of the largest class, a mark where the accuracy is not above it or of few faces, the metrics
    `MEASURED`, and the accuracy on the shares `COVERAGES` of the faces of the highest confidence.
    """
    counts = confusion(predictions)
    right, support = counts.diagonal(), counts.sum(axis=1)
    measured = {
        metric.heading: metric.unit.write(metric.compute(predictions)) for metric in map(METRICS.__getitem__, MEASURED)
    }
    covered = [PERCENT.write(1 - risk_at(predictions, share)) for share in COVERAGES]
    largest, accuracy = support.max() / support.sum(), right.sum() / support.sum()
    doubtful = is_doubtful(wilson(accuracy, int(support.sum()))[0], largest, int(support.sum()))
    recalls = {name: format_share(*pair) for name, *pair in zip(predictions.classes, right, support, strict=True)}
    return {
        "faces": len(predictions.labels),
        "largest": PERCENT.write(largest),
        "doubtful": doubtful,
        "accuracy": format_share(right.sum(), support.sum()) + " ‡" * doubtful,
        "recalls": recalls,
        "measured": measured,
        "covered": covered,
    }


def format_share(right: int, faces: int) -> str:
    """Return a share in percent with its 95 % interval of Wilson over faces: `71.4 (45.4–88.3)`."""
    if not faces:
        return "–"
    low, high = wilson(right / faces, faces)
    return f"{PERCENT.write(right / faces)} ({PERCENT.write(low)}–{PERCENT.write(high)})"


def describe_seeds(seeds: Sequence[Run], known: Mapping[str, str]) -> str:
    """Return the mean accuracy on unseen targets over all seeds of a run, in a sentence; nothing without such targets."""
    scores = read_scores(seeds, known, ["clean"])
    seeds_evaluated = scores.loc[scores["relation"] == UNSEEN, "run"].nunique()
    several = f"mean ± 95 % t-interval over {seeds_evaluated} seeds" if seeds_evaluated > 1 else "one seed"
    return describe_unseen(scores, several)


def describe_unseen(scores: pd.DataFrame, what: str) -> str:
    """Return the mean accuracy on unseen targets, of what, and which these are; nothing without such targets."""
    scores = scores[scores["protocol"] == "clean"]
    means = average_unseen(scores)
    if not len(means):
        return ""
    unseen = scores[scores["relation"] == UNSEEN]
    by_target = unseen.groupby("target")[["accuracy", "faces", "largest"]].mean()
    ends = [wilson(float(own["accuracy"]), float(own["faces"])) for _, own in by_target.iterrows()]
    low, high = combine_intervals(by_target["accuracy"].tolist(), ends)
    largest = by_target["largest"].mean()
    doubt = ", which is not above chance" if low <= largest else ""
    return (
        f"{estimate([float(value) for value in means['accuracy']])} % ({what}; {100 * low:.1f}–{100 * high:.1f} over "
        f"{by_target['faces'].sum():,.0f} faces) on {', '.join(by_target.index)}, where the largest classes have "
        f"{100 * largest:.1f} % of the faces{doubt}"
    )
