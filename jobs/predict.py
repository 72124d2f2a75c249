"""`cafe predict` and `cafe export`: a trained model on photographs and videos, and as a folder for other programs."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import PurePosixPath
from shutil import get_terminal_size
from typing import IO, TYPE_CHECKING, Any

import click

from cafe.errors import IncompleteError, UserError
from cafe.jobs.names import complete, complete_or_file
from cafe.jobs.options import options
from cafe.jobs.terminal import echo, interruptible, is_wide, open_workspace, progress_bar, records_option, say
from cafe.pipeline.process.progress import no_bar
from cafe.pipeline.settings import ExportSettings, PredictSettings

if TYPE_CHECKING:
    from upath import UPath

    from cafe.inference.annotation import Annotator
    from cafe.inference.model import Model
    from cafe.inference.output import Summary, Write
    from cafe.pipeline.release.export import Exported

SUFFIXES = {".csv": "csv", ".json": "json", ".jsonl": "jsonl", ".parquet": "parquet", ".txt": "table", "": "table"}


@click.command()
@click.argument(
    "words", nargs=-1, required=True, metavar="PATH...", shell_complete=complete_or_file("run", "experiment")
)
@options(PredictSettings)
@records_option
def predict(words: tuple[str, ...], **values: Any) -> None:
    """Predict the expressions in photos and videos.

    \b
    cafe predict party.jpg
    cafe predict ~/photos --output faces.csv                   # folders with all that is below them
    cafe predict talk.mp4 --rate 2 --annotate shown            # a video, and a copy with boxes and labels
    cafe predict party.jpg --model cafe-news-s0                # by a run of this workspace
    find . -name '*.jpg' | cafe predict - --model table1 --best source_val --ensemble --format jsonl

    PATH is a photo, a video, a folder, a pattern such as 'faces/*.jpg', the address of a picture, or - for a list of paths
    on standard input. It needs no workspace and no training: without --model the model that comes with this package is
    taken. The first PATH may name the model, too, where no file has that name.

    Every face is a row, and so is every picture without one, with the reason; a broken file ends nothing. Exit code 0: at
    least one face got a prediction; 1: none did; 2: a mistake in the command; 130: interrupted.
    """
    settings, workspace = PredictSettings(**values), open_workspace()
    form = _choose_format(settings)
    settings.check()

    from cafe.data.images import list_suffixes
    from cafe.files import check_output, locate
    from cafe.inference.annotation import Annotator, place_copies
    from cafe.inference.frames import find_files
    from cafe.inference.output import OWN
    from cafe.outputs import check_replaced
    from cafe.pipeline.release.choice import find_runs, split_words
    from cafe.pipeline.release.confidence import read_confidence

    if settings.output:
        check_output(settings.output, "--output")
    name, places = split_words(workspace, words, settings.model, settings.best)
    runs, chosen = find_runs(workspace, name, settings.best, settings.ensemble)
    files, others = find_files(list(_read_places(places)))
    if settings.output:
        _check_apart(settings.output, files)
        check_replaced(locate(settings.output), "--output", OWN[form])
    copies = Annotator(place_copies(files, locate(settings.annotate))) if settings.annotate else None
    say(chosen, err=True)
    confidence = read_confidence(runs)
    if confidence.warning:
        echo(f"Warning: {confidence.warning}", err=True)
    threshold = confidence.threshold if settings.threshold is None else settings.threshold
    summary = _predict(files, _load(runs, settings, threshold), settings, form, copies)
    for sentence in summary.sentences():
        say(sentence, err=True)
    if others:
        say(f"Files that are no photos or videos by their names: {list_suffixes(others)}.", err=True)
    for place in (settings.output, settings.annotate):
        if place:
            say(f"Wrote {place}", err=True)
    if not summary.faces:
        remedy = ", or lower --smallest or --confidence" if summary.without else ""
        raise IncompleteError(f"No face was predicted: see the reasons above{remedy}.")


def _predict(
    files: list[UPath], model: Model, settings: PredictSettings, form: str, copies: Annotator | None
) -> Summary:
    """Predict all faces of the files, write their rows and the copies that are wanted, and return what they come to."""
    from cafe.files import locate, write_whole
    from cafe.inference.frames import count_frames, read_frames
    from cafe.inference.output import Summary, list_rows
    from cafe.inference.recognition import Search, predict_frames

    search = Search(settings.aligned, settings.faces == "all", settings.smallest, settings.confidence)
    output = locate(settings.output) if settings.output else None
    summary, total = Summary(), sum(count_frames(file, settings.rate) for file in files)
    with ExitStack() as stack:
        stack.enter_context(interruptible("what was predicted so far is kept"))
        file = stack.enter_context(write_whole(output, keep=True)) if output else sys.stdout.buffer
        write = stack.enter_context(_open_rows(form, file, model.classes))
        progress = stack.enter_context(_show_progress(file))
        annotator = stack.enter_context(copies or nullcontext())
        frames = predict_frames(read_frames(files, settings.rate), model, search, copies is not None)
        for done, predicted in enumerate(frames, start=1):
            write(list_rows(predicted, model.classes))
            summary.add(predicted)
            if annotator:
                annotator.add(predicted)
            progress(done, max(done, total))
    return summary


def _open_rows(form: str, file: IO[bytes], classes: Sequence[str]) -> AbstractContextManager[Write]:
    """Begin to write rows; a table on a terminal is as wide as that."""
    from cafe.inference.output import FORMATS, write_table

    if form == "table" and file.isatty() and not is_wide():
        return write_table(file, classes, get_terminal_size().columns)
    return FORMATS[form](file, classes)


def _choose_format(settings: PredictSettings) -> str:
    """Return the format asked for, else what the name of the output says; raise `UserError` where that says nothing."""
    suffix = PurePosixPath(settings.output or "").suffix
    form = settings.format or SUFFIXES.get(suffix.casefold())
    if not form:
        known = ", ".join(filter(None, SUFFIXES))
        raise UserError(
            f"--output {settings.output} ends in {suffix!r}: choose {known}, or say the form with --format."
        )
    if form == "parquet" and not settings.output:
        raise UserError("Parquet is no text for a terminal: give --output FILE.parquet.")
    return form


def _check_apart(output: str, files: Sequence[UPath]) -> None:
    """Raise `UserError` where the rows would be written over a photo or video that is to be predicted."""
    from cafe.files import locate

    place = locate(output)
    if not place.protocol and place.resolve() in {file.resolve() for file in files if not file.protocol}:
        raise UserError(f"--output {output} would overwrite a picture that is to be predicted: give another file.")


def _read_places(places: Sequence[str]) -> Iterator[str]:
    for place in places:
        if place == "-":
            yield from filter(None, (line.strip("\r\n") for line in sys.stdin))
        else:
            yield place


def _load(runs: list[UPath], settings: PredictSettings, threshold: float | None) -> Model:
    """Load the model, and the face detector where it is needed, so that what is missing is said before work begins."""
    from cafe.data.alignment import find_detector
    from cafe.pipeline.models import build_model
    from cafe.pipeline.process.machine import own_device

    device = own_device(settings.use_gpu)
    if not settings.aligned:
        find_detector()
    model = build_model(runs, device)
    return replace(model, flip=model.flip or settings.flip, threshold=threshold)


def _show_progress(file: IO[bytes]) -> Any:
    """Return a bar, unless the rows themselves appear on the terminal."""
    return no_bar("", "") if file.isatty() else progress_bar("Predicting", "pictures")


@click.command()
@click.argument("run", shell_complete=complete("run"))
@options(ExportSettings)
def export(run: str, **values: Any) -> None:
    """Export a run as ONNX, safetensors and a model card.

    RUN is the name of a run of this workspace or its unambiguous beginning. The graph holds everything from the pixels of an
    aligned face to the probabilities of the classes, and is checked against PyTorch on real faces. Needs
    `pip install 'cafe-fer[export]'` (onnx, onnxscript, onnxruntime), unless --no-graph leaves it out.

    \b
    cafe export cafe-news-s0 --output model
    cafe export cafe-news-s0 --ensemble --flip           # all its seeds, and mirror images, averaged in the graph too
    cafe export mlp-news-s0 --weights float16 --no-graph # as small as it gets, for programs that have this package
    """
    from cafe.files import locate
    from cafe.pipeline.release.export import export_run, name_folder
    from cafe.pipeline.tracking.mirror import Mirror
    from cafe.results.runs import choose

    settings, workspace = ExportSettings(**values), open_workspace()
    settings.check()
    mirror = Mirror(workspace, settings.mlflow_uri)
    runs, _ = choose(workspace.read_runs("" if settings.ensemble else run), name=run, ensemble=settings.ensemble)
    folder = locate(settings.output) if settings.output else name_folder(workspace, runs, settings)
    exported = export_run(workspace, runs[0].name, folder, settings)
    say(f"Wrote {exported.folder}{_describe_checks(exported)}. Read README.md there before you ship it.")
    if settings.mlflow or settings.register:
        from cafe.pipeline.release.pyfunc import log_model

        say(log_model(mirror, runs[0].folder, exported.folder, settings.register))


def _describe_checks(exported: Exported) -> str:
    """Return by how much the numbers of an export differ from those of its run, as the end of a sentence."""
    on, said = f"on {exported.faces} faces", list[str]()
    if exported.difference is not None:
        said.append(f"the graph differs from PyTorch by at most {exported.difference:.1e}")
    if exported.rounding is not None:
        said.append(f"weights in half precision change probabilities by at most {exported.rounding:.1e}")
    return f": {on} {', and '.join(said)}" if said else ""
