"""Faces: one manifest or several as one, each with the store of its features, to train or to evaluate on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
from upath import UPath

from cafe.data.expressions import order_classes
from cafe.data.images import MAX_PIXELS
from cafe.data.manifest import Manifest, Pictures, hold_out_rows
from cafe.data.rows import SPLITS
from cafe.data.votes import share
from cafe.errors import DamagedError, IncompleteError, UserError
from cafe.learning.loading import KeptPictures
from cafe.methods import find_method
from cafe.pipeline.features.integrity import Receipts
from cafe.pipeline.features.key import StoreInfo
from cafe.pipeline.need import Stores, choose_target_stores, find_readers, join_layers
from cafe.pipeline.process.machine import free_memory
from cafe.pipeline.runs import RunSpec
from cafe.pipeline.workspace import Workspace
from cafe.records import digest
from cafe.results.columns import Column
from cafe.results.predictions import Predictions, name_rows
from cafe.results.protocols import Protocol, find_protocol
from cafe.results.sources import UNSEEN, Source, find_relation

if TYPE_CHECKING:
    from cafe.pipeline.features.store import FeatureReader, FeatureStore

PICTURES_SHARE = 0.2  # of the free memory that decoded pictures of a source may take
HELD_OUT = 0.1  # of the training faces of a source, for `source_val`


class _PicklesFields:
    """Goes to other processes with its fields alone, without what this one has opened."""

    def __getstate__(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in fields(self)}  # type: ignore[arg-type]


@dataclass(frozen=True)
class Part(_PicklesFields):
    """The faces of one manifest and, where they are read, the stores of their frozen features, one for each layer."""

    place: UPath  # of the manifest
    digest: str  # of the manifest
    stores: Stores = ()
    unreadable: tuple[int, ...] = ()  # rows whose picture no store could read, where no features are read

    @classmethod
    def of_pictures(cls, workspace: Workspace, manifest: Manifest) -> Part:
        """Return the faces of a manifest whose features nobody reads: all whose pictures can be read.

        A picture counts as readable when any store has it, or left it out only for a limit of its own to the pixels, so
        that it plays no part which stores there are.
        """
        known = [Receipts(*store).unreadable() for store in find_readers(workspace, manifest)]
        rows = sorted(set.intersection(*known)) if known else []
        return replace(cls.of(workspace, manifest), unreadable=tuple(rows))

    @classmethod
    def of(cls, workspace: Workspace, manifest: Manifest, stores: Stores = ()) -> Part:
        """Return the faces of a manifest that is read already."""
        part = cls(workspace.manifest_path(manifest.name), manifest.digest, stores)
        vars(part)["manifest"] = manifest
        return part

    @property
    def name(self) -> str:
        """The name of the manifest."""
        return self.place.stem

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest; raises `UserError` when it is no longer the one that was planned with."""
        manifest = Manifest.load(self.place)
        if manifest.digest != self.digest:
            raise UserError(f"The manifest {self.name!r} has changed since this command began: give it again.")
        return manifest

    @property
    def info(self) -> StoreInfo | None:
        """What its stores are side by side."""
        return join_layers(self.stores) if self.stores else None

    @cached_property
    def features(self) -> list[FeatureStore]:
        """The feature stores, opened."""
        from cafe.pipeline.features.store import FeatureStore  # Zarr, which no plan needs

        return [FeatureStore(path, info) for path, info in self.stores]

    @cached_property
    def valid(self) -> np.ndarray | None:
        """Which rows have features or, where none are read, a picture, (N,) bool; None where that is all of them."""
        if self.stores:
            valid: np.ndarray = np.logical_and.reduce([Receipts(path, info).valid() for path, info in self.stores])
            return valid
        if not self.unreadable:
            return None
        valid = np.ones(len(self.manifest), bool)
        valid[list(self.unreadable)] = False
        return valid

    def rows(self, split: str) -> np.ndarray:
        """The rows of a split that can be used."""
        rows = self.manifest.rows(split)
        return rows if self.valid is None else rows[self.valid[rows]]


@dataclass(frozen=True)
class Faces(_PicklesFields):
    """The faces of one or several manifests, one manifest after another, as if they were one data set.

    A face keeps its root, its box and its sample_id, so that its views are those it has alone. Labels count in the order of
    `classes`; a face of another class is in no split. `column` says how a target is evaluated, and `split` on which of its
    faces.
    """

    parts: tuple[Part, ...]
    classes: tuple[str, ...]
    column: Column | None = None
    split: str = "test"

    @classmethod
    def of(cls, *parts: Part) -> Faces:
        """Return the faces of some manifests, with all of their classes."""
        first, *others = (part.manifest.classes for part in parts)
        alike = all(classes == first for classes in others)
        return cls(parts, first if alike else order_classes(name for classes in (first, *others) for name in classes))

    @property
    def name(self) -> str:
        """What runs call them: `a+b` where there are several manifests."""
        return "+".join(part.name for part in self.parts)

    @property
    def kind(self) -> str:
        """The data set they are of, where all manifests agree, and else nothing."""
        kinds = {part.manifest.kind for part in self.parts}
        return kinds.pop() if len(kinds) == 1 else ""

    @property
    def digest(self) -> str:
        """Names the manifests."""
        return _name_together([part.digest for part in self.parts])

    @property
    def image_digest(self) -> str:
        """Names the images of the manifests."""
        return _name_together([part.manifest.image_digest for part in self.parts])

    @property
    def info(self) -> StoreInfo | None:
        """What the first manifest's stores are; in all that a training reads the others are like it."""
        return self.parts[0].info

    @property
    def channels(self) -> str:
        """The order of the colours in which they are evaluated."""
        return find_protocol(self.column.protocol).channels(self.kind) if self.column else "rgb"

    @cached_property
    def starts(self) -> np.ndarray:
        """The first row of every manifest, (D,)."""
        return np.cumsum([0, *(len(part.manifest) for part in self.parts[:-1])])

    @cached_property
    def domains(self) -> np.ndarray:
        """Which of the manifests every row is of, (N,)."""
        return np.repeat(np.arange(len(self.parts)), [len(part.manifest) for part in self.parts])

    @cached_property
    def sample_ids(self) -> list[str]:
        """The sample_id of every row."""
        return [sample for part in self.parts for sample in part.manifest.sample_ids]

    @cached_property
    def labels(self) -> np.ndarray:
        """The label of every row, (N,) int64; -1 for a class that is none of these."""
        places = {name: place for place, name in enumerate(self.classes)}
        labels = []
        for part in self.parts:
            labels.append(np.array([places.get(name, -1) for name in part.manifest.classes])[part.manifest.labels])
        return np.concatenate(labels)

    @cached_property
    def votes(self) -> np.ndarray | None:
        """How many people chose each of these classes of every row, (N, K) int64, 0 where not known; None for no face."""
        known = [(part.manifest, start) for part, start in zip(self.parts, self.starts, strict=True)]
        voted = [(manifest, manifest.votes, start) for manifest, start in known if manifest.votes is not None]
        votes = np.zeros((len(self.labels), len(self.classes)), np.int64)
        for manifest, own, start in voted:
            for place, name in enumerate(manifest.classes):
                if name in self.classes:
                    votes[start : start + len(own), self.classes.index(name)] = own[:, place]
        return votes if voted else None

    @cached_property
    def shares(self) -> np.ndarray:
        """The shares of the classes (N, K) float32 that people's votes give every row, or its label where nobody voted."""
        votes = np.zeros((len(self.labels), len(self.classes)), np.int64) if self.votes is None else self.votes
        return share(votes, self.labels)

    def path(self, row: int) -> UPath:
        """Where the image of a row lies."""
        part, own = self._find(row)
        return part.manifest.path(own)

    @property
    def remote(self) -> bool:
        """Whether the pictures of any of them lie in an object store."""
        return any(part.manifest.remote for part in self.parts)

    def fetch(self, row: int) -> bytes:
        """Return the bytes of a face's picture."""
        part, own = self._find(row)
        return part.manifest.fetch(own)

    def decode_face(self, row: int, data: bytes, channels: str = "rgb", max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """Return the pixels of a face (H, W, 3) uint8 as its manifest does."""
        part, own = self._find(row)
        return part.manifest.decode_face(own, data, channels, max_pixels)

    def read_face(self, row: int, channels: str = "rgb", max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """Return the pixels of a face (H, W, 3) uint8 as its manifest does."""
        part, own = self._find(row)
        return part.manifest.read_face(own, channels, max_pixels)

    def _find(self, row: int) -> tuple[Part, int]:
        domain = self.domains[row]
        return self.parts[domain], int(row - self.starts[domain])

    def groups(self, rows: np.ndarray) -> list[str | None]:
        """The person or film of each of some rows."""
        groups = [group for part in self.parts for group in part.manifest.table["group"].to_pylist()]
        return [groups[row] for row in rows]

    @property
    def pictures(self) -> Pictures:
        """What decodes them: the manifest itself, where there is one and its labels are these."""
        manifest = self.parts[0].manifest
        return manifest if len(self.parts) == 1 and manifest.classes == self.classes else self

    @cached_property
    def kept_pictures(self) -> KeptPictures:
        """The same, kept decoded while there is room."""
        return KeptPictures(self.pictures, int(PICTURES_SHARE * free_memory()))

    @cached_property
    def _readers(self) -> dict[tuple[str, ...], FeatureReader]:
        return {}

    def reader(self, names: Sequence[str]) -> FeatureReader | None:
        """Return what reads these arrays of the stores; views it has read are kept with these faces."""
        stores = [part.features for part in self.parts if part.features]
        if not stores or not names:
            return None
        from cafe.pipeline.features.store import FeatureReader

        return self._readers.setdefault(tuple(sorted(names)), FeatureReader(stores, sorted(names)))

    def rows(self, split: str) -> np.ndarray:
        """The rows of a split that have features, where they are read, and one of the classes."""
        return self._join([part.rows(split) for part in self.parts])

    def _join(self, several: Sequence[np.ndarray]) -> np.ndarray:
        """Return rows of each manifest as rows of all, without those of other classes."""
        rows: np.ndarray = np.concatenate([own + start for own, start in zip(several, self.starts, strict=True)])
        known: np.ndarray = rows[self.labels[rows] >= 0]
        return known

    def split_rows(self, selection: str, calibration: str = "none") -> tuple[np.ndarray, np.ndarray]:
        """Return the rows to train on and those on which the epoch is selected and the model calibrated; of no target.

        `source_val`, `swad` and every calibration take the data set's own validation split, or hold a tenth of the train
        split out where there is none or where it is what is evaluated, as of AffectNet and SFEW. Of several sources they
        always hold a tenth of each one out, as DomainBed's training-domain validation does, so that a large validation split
        does not outweigh the others.
        """
        own_val = len(self.parts) == 1
        selection = "source_val" if calibration != "none" else selection
        train, held_out = zip(*(_split_rows(part, selection, own_val) for part in self.parts), strict=True)
        return self._join(train), self._join(held_out)

    def is_evaluated(self, run: UPath) -> bool:
        """Whether there are predictions of a run for the faces to evaluate on, as they are listed and readable now."""
        try:
            predictions = Predictions.load(self.column.predictions(run)) if self.column else None
        except DamagedError:  # evaluating again is what repairs it
            return False
        if predictions is None or predictions.target_classes != self.parts[0].manifest.classes:
            return False
        if (predictions.about.get("manifest"), predictions.about.get("split")) != (self.digest, self.split):
            return False
        return predictions.rows == name_rows([self.sample_ids[row] for row in self.rows(self.split)])


def _split_rows(part: Part, selection: str, own_val: bool) -> tuple[np.ndarray, np.ndarray]:
    train = part.rows("train")
    if selection == "source_test":
        return train, part.rows("test")
    if selection not in ("source_val", "swad"):
        return train, train[:0]
    val, manifest = part.rows("val"), part.manifest
    evaluated = find_protocol("clean").split(manifest, manifest.kind, seen=True)
    return (train, val) if own_val and len(val) and evaluated != "val" else hold_out_rows(manifest, train, HELD_OUT)


def _name_together(digests: Sequence[str]) -> str:
    """Name several things together, and a single one by its own name."""
    return digests[0] if len(digests) == 1 else digest("+".join(digests).encode())


def choose_split(workspace: Workspace, target: Manifest, protocol: Protocol, sources: Sequence[Source]) -> str | None:
    """Return the split of a target that a protocol evaluates for what was trained on some sources, None for none."""
    relation = find_relation(sources, target.name, "", target.kind, target.digest)
    seen = relation != UNSEEN or (target.parted and _share_pictures(workspace, target, sources))
    return protocol.split(target, *(source.kind for source in sources), seen=seen)


def _share_pictures(workspace: Workspace, target: Manifest, sources: Sequence[Source]) -> bool:
    """Whether a target has most of its pictures, or of a source's, in common with one: the same folder by another name."""
    names = set(workspace.manifest_names())
    for source in (workspace.load_manifest(source.name) for source in sources if source.name in names):
        shared = pc.sum(pc.is_in(target.table["digest"], value_set=source.table["digest"])).as_py() or 0
        if 2 * shared > min(len(target), len(source)):
            return True
    return False


def choose_target(
    workspace: Workspace, name: str, spec: RunSpec, protocol: Protocol, split: str | None = None
) -> Faces:
    """Return a target as the protocol evaluates it, or on another split, with the store that matches the run's tower.

    Raises `UserError` when the protocol has no way to evaluate it or when the run needs features and there are none.
    """
    manifest = workspace.load_manifest(name)
    usual = choose_split(workspace, manifest, protocol, spec.trained_on)
    chosen = split or usual
    if chosen is None:
        raise UserError(
            f"The protocol {protocol.name!r} has no way to evaluate {name!r} ({protocol.about}): leave it out with "
            f"--targets, or evaluate on it apart with `cafe evaluate RUN --targets {name} --split SPLIT`."
        )
    if not len(manifest.rows(chosen)):
        there = ", ".join(split for split in SPLITS if len(manifest.rows(split)))
        raise UserError(f"{name!r} has no faces in the split {chosen!r}: choose {there}, or leave it out.")
    reads = find_method(spec.method).needs_features() and not spec.exported  # which is evaluated on the pictures
    part, other_split = Part.of_pictures(workspace, manifest), "" if chosen == usual else chosen
    if reads:
        part = Part.of(workspace, manifest, choose_target_stores(workspace, manifest, spec, protocol))
    faces = Faces((part,), spec.classes, Column(name, other_split, protocol.plain, protocol.option), chosen)
    if len(faces.rows(chosen)):
        return faces
    if len(part.rows(chosen)):
        raise UserError(
            f"No face of {name!r} in the split {chosen!r} shows a class of this run ({', '.join(spec.classes)}), but "
            f"{', '.join(manifest.classes)}: leave it out with --targets."
        )
    raise UserError(
        f"No face of {name!r} in the split {chosen!r} is readable: see why with `cafe data check {name}`, or leave it "
        "out with --targets."
    )


def choose_targets(
    workspace: Workspace, wanted: str | None, spec: RunSpec, protocol: str, split: str | None = None
) -> list[Faces]:
    """Return the targets of a comma-separated list, of nothing for `none`; without one, of all that share a class.

    Of those that nobody named, what the run cannot be evaluated on is left out with a warning that says how to add it;
    raises `UserError` where that is all of them.
    """
    if wanted == "none":
        return []
    workspace = workspace.keeping_manifests()
    if wanted is not None:
        names = list(dict.fromkeys(name for part in wanted.split(",") if (name := part.strip())))
        if not names:
            raise UserError(f"--targets {wanted!r} names no manifest: give some, comma-separated, or none.")
    else:
        known = set(spec.classes)
        names = [name for name in workspace.manifest_names() if known & set(workspace.load_manifest(name).classes)]
    found, unfit = list[Faces](), list[UserError]()
    for name in names:
        try:
            found.append(choose_target(workspace, name, spec, find_protocol(protocol), split))
        except (DamagedError, IncompleteError):
            raise
        except UserError as error:
            if wanted is not None:
                raise
            unfit.append(error)
            options = f" --protocol {protocol}" * (protocol != "clean") + f" --split {split}" * bool(split)
            logging.getLogger(__name__).warning(
                "Left out: %s. %s Then: cafe evaluate %s --targets %s%s", name, error, spec.name, name, options
            )
    if unfit and not found:
        raise unfit[0]
    return found
