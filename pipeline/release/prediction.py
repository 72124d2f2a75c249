"""`cafe.predict`: photographs, videos and pictures in memory in, a row for every face out, in one line of a program."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain, groupby
from typing import Any, Literal

import numpy as np
from PIL import Image
from upath import UPath

from cafe.addresses import own
from cafe.data.alignment import find_detector
from cafe.data.images import UnreadableImageError, image_pixels
from cafe.files import retry
from cafe.inference.frames import Frame, find_files, read_frames
from cafe.inference.model import Model, read_pixels
from cafe.inference.output import list_rows
from cafe.inference.recognition import Search, predict_frames
from cafe.pipeline.models import build_model
from cafe.pipeline.process.machine import own_device
from cafe.pipeline.release.choice import find_runs
from cafe.pipeline.release.confidence import read_confidence
from cafe.pipeline.release.shipped import SHIPPED
from cafe.pipeline.runs import DECIDING, model_folder
from cafe.pipeline.settings import PredictSettings
from cafe.pipeline.workspace import Workspace

Shown = str | os.PathLike[str] | np.ndarray | Image.Image


def predict(
    what: Shown | Iterable[Shown],
    model: str | Model = SHIPPED,
    workspace: str = "work",
    *,
    best: str | None = None,
    ensemble: bool = False,
    flip: bool = PredictSettings.flip,
    aligned: bool = PredictSettings.aligned,
    faces: Literal["largest", "all"] = PredictSettings.faces,
    smallest: int = PredictSettings.smallest,
    confidence: float = PredictSettings.confidence,
    threshold: float | None = None,
    rate: float = PredictSettings.rate,
    device: str | None = None,
) -> list[dict[str, Any]]:
    """Return a row for every face, with the columns of `cafe predict`, in order; `pandas.DataFrame(rows)` is a table.

    `what` is a photo or video by its path or address (http, https), a folder, a pattern, a picture of PIL or an array
    (H, W, 3) uint8 in RGB order; or several of these. A picture in which there is no face, or that cannot be read, is a row
    with an `error`; of what came as pixels, `file` is the place in the list. `model` is a name, as of `load_model`, or a
    model that is loaded; the last two that were named stay in memory, and one that knows nothing warns. The rest is what the
    options of the command are. Raises `UserError` for a place where there is nothing, unless it is a web address, whose row
    has the error, and for arrays of another form.

    >>> pictures = [load_manifest("two", workspace).read_face(row) for row in range(2)]
    >>> rows = predict(pictures, "cafe-one-s0", workspace, aligned=True)
    >>> [(row["file"], row["face"], row["width"], row["error"]) for row in rows]
    [('0', 0, 24, None), ('1', 0, 24, None)]
    >>> rows[0]["expression"] in ("surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral")
    True
    """
    alone = isinstance(what, str | bytes | os.PathLike | np.ndarray | Image.Image) or not isinstance(what, Iterable)
    several: list[Any] = [what] if alone else list(what)  # type: ignore[arg-type]
    PredictSettings(faces=faces, confidence=confidence, threshold=threshold, rate=rate).check()
    frames = list(_find_frames(several, rate))  # all of them are looked up before any is read
    if isinstance(model, str):
        folders, _ = find_runs(Workspace.at(workspace), model, best, ensemble)
        trusted, model = read_confidence(folders), _load(tuple(folders), _stamp(folders), device)
        model = replace(model, threshold=trusted.threshold)
        if trusted.warning:
            warnings.warn(trusted.warning, stacklevel=2)
    model = model if threshold is None else replace(model, threshold=threshold)
    if not aligned:
        find_detector()
    search, model = Search(aligned, faces == "all", smallest, confidence), replace(model, flip=model.flip or flip)
    found = predict_frames(chain.from_iterable(frames), model, search)
    return [row for predicted in found for row in list_rows(predicted, model.classes)]


def _find_frames(several: Sequence[Any], rate: float) -> Iterator[Iterator[Frame]]:
    """Yield the frames of every stretch of places, and of every picture; raise `UserError` for what is neither."""
    for is_place, group in groupby(enumerate(several), lambda one: isinstance(one[1], str | os.PathLike)):
        if is_place:
            places = [os.fspath(place) for _, place in group]
            own(*places)
            yield read_frames(find_files(places).files, rate)
        else:
            yield iter([_open_picture(str(number), picture) for number, picture in group])


def _open_picture(name: str, picture: Any) -> Frame:
    """Return a picture in memory as a frame; one of PIL whose file is damaged says so there."""
    if not isinstance(picture, Image.Image):
        return Frame(UPath(name), read_pixels(picture))
    try:
        return Frame(UPath(name), image_pixels(picture))
    except UnreadableImageError as error:
        return Frame(UPath(name), error=str(error))


def _stamp(folders: Sequence[UPath]) -> tuple[str, ...]:
    """Return what changes when a file by which a model predicts is written, copied over or removed."""
    found = []
    for folder in (model_folder(folder) for folder in folders):
        entries = retry(folder, "read", lambda folder=folder: folder.fs.find(folder.path, maxdepth=1, detail=True))
        found += [f"{name} {about}" for name, about in sorted(entries.items()) if name.endswith(DECIDING)]
    return tuple(found)


@lru_cache(maxsize=2)
def _load(folders: tuple[UPath, ...], stamp: tuple[str, ...], device: str | None) -> Model:
    """Return a model, which is kept for the next call as long as its files are those of this `stamp`."""
    return build_model(folders, device or own_device(None))
