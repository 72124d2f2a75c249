"""The settings of the commands that compute, with their defaults: frozen dataclasses.

The options of the command line and the keys that a benchmark file may have are generated from them.

What a setting may be stands in its type: `Literal` lists its choices, whole numbers have a least value and a largest. Kept
free of heavy imports so that `cafe --help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Interval

from cafe.errors import UserError, unknown
from cafe.results.protocols import ProtocolName, TestTime

LARGEST = 2**31 - 1
Count = Annotated[int, Interval(ge=1, le=LARGEST)]
Number = Annotated[int, Interval(ge=0, le=LARGEST)]
Workers = Annotated[int, Interval(ge=1, le=4096)]  # or threads, or processes
Helpers = Annotated[int, Interval(ge=0, le=4096)]
Side = Annotated[int, Interval(ge=16, le=4096)]  # of a picture, in pixels
Seed = Annotated[int, Interval(ge=-(2**63), le=2**63 - 1)]  # of 64 bits

# Of cafe.views.drawing and cafe.towers, which take a second to import.
Policy = Literal["paper", "scn", "eac", "ofer", "clean", "clean+flip", "flip"]
Normalisation = Literal["tower", "imagenet", "clip"]


def setting(default: Any, about: str, in_file: bool = True, **click: Any) -> Any:
    """A dataclass field with its help text and, where needed, its `flag`, the `group` its option is in where that is not its
    class's, or that it is `required` or `multiple`.

    `in_file` says whether a benchmark file may set it: not what the grid itself decides, nor what belongs to the command.
    """
    return field(default=default, metadata={"help": about, "in_file": in_file, **click})


def take(settings: Any, kind: type[Any]) -> dict[str, Any]:
    """Return the values of those settings that a class of settings has, by name."""
    return {one.name: getattr(settings, one.name) for one in fields(kind)}


@dataclass(frozen=True)
class ClusterSettings:
    """Where the work runs: the same for every command that computes."""

    GROUP: ClassVar[str] = "Machine"  # of the options in the help of a command

    address: str | None = setting(
        None, "Ray cluster to join (HOST:PORT or auto); default: this machine alone.", in_file=False
    )
    num_cpus: Workers | None = setting(None, "Cores to use on this machine; default: all.", in_file=False)
    scale_minutes: Number = setting(
        0,
        "Minutes to wait for GPUs or cores of the cluster: at the start for those that an autoscaler is to bring, later for "
        "those that were lost; 0: at the start not at all, later as long as it takes.",
        in_file=False,
    )
    silent_seconds: Annotated[int, Interval(ge=10, le=LARGEST)] = setting(
        300, "Seconds without a sign of life after which a worker counts as lost.", in_file=False
    )
    wait: bool = setting(
        False, "Wait while another command works on the same thing, instead of ending with an error.", in_file=False
    )


@dataclass(frozen=True)
class FeatureIdentity:
    """What a user chooses that decides a feature and stands in the key of its store as it is."""

    GROUP: ClassVar[str] = "Features"

    precision: Literal["fp32", "tf32", "bf16", "fp16"] = setting(
        "fp32", "Arithmetic of the whole tower; tf32: float32 with shorter factors, faster on recent GPUs."
    )
    interpolation: Literal["bilinear", "bicubic"] = setting("bilinear", "How faces are resized.")
    view_seed: Seed = setting(0, "Seed of the views (not of the training).")
    views: Count = setting(1, "Views per face: view 0 is clean, the others are augmented by the policy.", in_file=False)
    maps: bool = setting(False, "Store the tower's spatial feature maps too.", in_file=False)
    dtype: Literal["float16", "float32"] = setting("float16", "Number format of the stored features.")
    channels: Literal["rgb", "bgr"] = setting(
        "rgb", "Order of the colours the tower sees; bgr is for targets of the protocol paper.", in_file=False
    )

    batch_size: Count = setting(64, "Views per forward pass of the tower; smaller passes are filled up.")
    max_megapixels: Count = setting(25, "Largest picture to decode; larger ones are left out as unreadable.")


@dataclass(frozen=True)
class FeatureSettings(FeatureIdentity):
    """What decides a feature besides the images and the weights; the key holds what the choices here come to."""

    GROUP: ClassVar[str] = "Features"

    backbone: str = setting(
        "clip-vit-b32",
        "Frozen tower: clip-vit-b32, face-resnet, imagenet-lite0, open_clip:MODEL/TAG, open_clip:MODEL@FILE, "
        "timm:MODEL[@FILE]; #LAYER/GRID behind it reads a layer, such as #stage3/3x3, + between several side by side.",
        in_file=False,
    )
    policy: Policy = setting("paper", "How views are augmented.", in_file=False)
    normalisation: Normalisation | None = setting(
        None, "Pixel statistics; default: the backbone's own, ImageNet's for clip-vit-b32 as published."
    )
    input_size: Side | None = setting(None, "Side of the tower's input in pixels; default: the tower's own.")


@dataclass(frozen=True)
class ExtractSettings(ClusterSettings, FeatureSettings):
    """Stage one: features of a manifest."""

    GROUP: ClassVar[str] = "Machine"

    layers: str | None = setting(
        None,
        "Layers of the tower to store from one pass, such as stage2/4x4,stage3/3x3; default: as --backbone says.",
        in_file=False,
        group="Features",
    )
    use_gpu: bool | None = setting(None, "Run towers on GPUs; default: when the cluster has one.", flag="--gpu/--cpu")
    num_gpus: Helpers | None = setting(None, "GPUs to use; default: all of the cluster.")
    num_actors: Workers | None = setting(
        None,
        "Towers at work; default: one per GPU; without GPUs one per core of a cluster, or per four of this machine.",
    )
    decoders: Helpers | None = setting(
        None,
        "Processes that decode ahead of each tower; default: one; for a GPU four, or its cores where views are few.",
    )
    shard_rows: Count | None = setting(None, "Faces per shard; default: about 4 MB, and at least 16 shards.")
    max_skipped: Number = setting(0, "Unreadable images to tolerate before the command fails.", group="Data")
    retry_skipped: bool = setting(
        False,
        "Compute shards again in which images were left out: files that were away may be back. One that was repaired is "
        "another file: index it again.",
        in_file=False,
        group="Data",
    )


@dataclass(frozen=True)
class StoreChoice:
    """Which of a data set's feature stores to use; needed only when there are several."""

    GROUP: ClassVar[str] = "Features"

    backbone: str | None = setting(
        None,
        "Frozen tower of the features; default: that of the only store; none: no tower, where a method needs none.",
        in_file=False,
    )
    views: Count | None = setting(
        None, "Views to use, from a feature store that has at least as many; default: all.", in_file=False
    )
    policy: Policy | None = setting(None, "View policy of the feature store.", in_file=False)
    view_seed: Seed | None = setting(
        None, "Seed of its views; for a method without features, of those it sees (default: 0).", in_file=False
    )
    store: str | None = setting(
        None,
        "Folder name of the feature store, where nothing else tells two of them apart; comma-separated for several sources.",
        in_file=False,
    )


@dataclass(frozen=True)
class RunIdentity:
    """What a user chooses that decides the result of a run and stands in its record as it is."""

    GROUP: ClassVar[str] = "What is trained"

    method: str = setting("cafe", "Method to train, e.g. cafe, scn, rul, eac, linear_probe.", in_file=False)
    seed: Seed = setting(0, "Seed of initial weights, order and dropped channels.", in_file=False)
    network: str = setting("resnet18", "Image branch: resnet18, resnet50, mobilenet_v2, efficientnet_lite0.")
    init: str = setting("scratch", "Initial weights of the image branch: scratch, imagenet or file:PATH.")
    live: bool = setting(
        False,
        "Run the tower on a fresh view in every epoch, as published, instead of reading the store's views: slow.",
        in_file=False,
    )
    views_per_seed: bool = setting(
        False, "Draw the views by --seed too: use the store whose --view-seed is that number.", in_file=False
    )
    sampler: Literal["proportional", "balanced"] = setting(
        "proportional",
        "How often the faces of several sources are drawn: each face once an epoch, or each source equally often.",
        group="Data",
    )
    selection: Literal["final", "source_val", "source_test", "leave_one_out", "oracle", "swad"] = setting(
        "final",
        "Which epoch is evaluated: the last, or the best on faces held out of the source (source_val), on its test faces "
        "(source_test), on each source left out of a training on the others (leave_one_out), or, only to know what a choice "
        "could gain, on training faces of --fold (oracle); swad: the mean of several, by the loss on held-out faces.",
    )
    fold: str = setting(
        "",
        "The domain left out, of leave-one-domain-out: the run is evaluated on it alone, in a row of folds.",
        in_file=False,
        group="Data",
    )
    draw: Number | None = setting(
        None,
        "Draw of a sweep: the settings that you do not give are drawn by it and --seed; 0: the defaults.",
        in_file=False,
    )
    tag: str = setting("", "A word of your own in the run's name; the same command with another tag is another run.")


@dataclass(frozen=True)
class RunChoices(StoreChoice):
    """What decides the result of a run too, but is open until manifest, store and method are known: the record holds
    what it comes to.
    """

    GROUP: ClassVar[str] = "What is trained"

    source: str = setting(
        "", "Manifest to train on, or several, comma-separated: their union.", in_file=False, required=True
    )
    start: str = setting(
        "",
        "Model to continue from: shipped, a run, a folder of `cafe export` or an address of MLflow's; its method, features "
        "and recipe are kept unless you give others, and the epoch is chosen on held-out faces.",
        in_file=False,
    )
    epochs: Count | None = setting(None, "Passes over the source; default: the method's published recipe.")
    overrides: tuple[str, ...] = setting(
        (),
        "Change a setting of the method's recipe: KEY=VALUE, e.g. separation=0.",
        in_file=False,
        multiple=True,
        flag="--set",
        metavar="KEY=VALUE",
    )
    image_size: Side | None = setting(None, "Side of the image branch's input; default: the tower's input.")
    precision: Literal["fp32", "tf32", "bf16", "auto"] = setting(
        "fp32", "Arithmetic of training (bf16: autocast; auto: bf16 where this machine computes with it, else fp32)."
    )
    scale_batch: bool = setting(
        False,
        "Give each of several workers a whole batch of the recipe, and multiply the learning rate by their number: not as "
        "published.",
    )


@dataclass(frozen=True)
class Execution(ClusterSettings):
    """Where and how a training runs, and what becomes of it: the result of the run does not depend on it."""

    GROUP: ClassVar[str] = "Machine"

    targets: str | None = setting(
        None,
        "Manifests to evaluate on, comma-separated, or none; default: all that share a class with the source.",
        in_file=False,
        group="Data",
    )
    protocol: ProtocolName = setting(
        "clean", "How targets are evaluated; training does not depend on it.", in_file=False, group="Data"
    )
    num_workers: Workers = setting(1, "Training workers (DDP); the result does not depend on it.")
    use_gpu: bool | None = setting(
        None, "One GPU per worker; default: when the cluster has enough.", flag="--gpu/--cpu"
    )
    threads: Workers | None = setting(
        None, "Threads of each worker; default: its share of the machine's cores.", in_file=False
    )
    loader_workers: Helpers | None = setting(
        None,
        "Processes per worker that make views ahead; default: none, or up to 8 for a GPU and a policy that turns faces.",
    )
    checkpoint_every: Count = setting(1, "Epochs between checkpoints.")
    checkpoint_minutes: Number = setting(
        10, "Minutes after which a checkpoint is also written in the middle of an epoch; 0: after every step."
    )
    mlflow_uri: str | None = setting(
        None, "MLflow tracking server; default: the workspace's own database.", in_file=False, group="Tracking"
    )
    experiment: str = setting("cafe", "MLflow experiment.", in_file=False, group="Tracking")
    system_metrics: bool = setting(
        False,
        "Log the load of this machine's processors, memory, disk and GPUs in MLflow, too.",
        in_file=False,
        group="Tracking",
    )


@dataclass(frozen=True)
class TrainSettings(Execution, RunChoices, RunIdentity):
    """Stage two: one method on one source, evaluated on the others."""


@dataclass(frozen=True)
class EvaluateSettings(ClusterSettings):
    """One run against any number of targets."""

    GROUP: ClassVar[str] = "Data"

    targets: str | None = setting(
        None, "Manifests to evaluate on, comma-separated; default: all with a class of the run's."
    )
    protocol: ProtocolName = setting("clean", "How targets are evaluated: clean, or paper as the released readers do.")
    test_time: TestTime | None = setting(
        None,
        "Average each face with its mirror image (flip) or over five views, or adapt to the target's faces (tent, t3a, "
        "sar, shot): "
        "numbers apart from all others.",
    )
    split: Literal["test", "val", "train", "all"] | None = setting(
        None, "Faces to evaluate on; default: those the protocol names."
    )
    exclude_leaks: bool = setting(False, "Also give the numbers without copies of the source's training faces.")
    use_gpu: bool | None = setting(
        None, "Predict on a GPU; default: when the cluster has one.", flag="--gpu/--cpu", group="Machine"
    )
    mlflow_uri: str | None = setting(
        None, "MLflow tracking server; default: the workspace's own database.", group="Tracking"
    )
    experiment: str | None = setting(
        None, "MLflow experiment to show it in as well; default: those it is in.", group="Tracking"
    )


@dataclass(frozen=True)
class BenchmarkSettings(ClusterSettings):
    """How a benchmark file is run; what is computed is in the file alone."""

    GROUP: ClassVar[str] = "What is trained"

    dry_run: bool = setting(False, "Show the plan and what it costs, and do nothing.")
    only: str | None = setting(None, "Only cells whose SOURCE/METHOD/SEED matches, e.g. 'rafdb/*' or '*/cafe*/s0'.")
    parallel: Workers | None = setting(
        None,
        "Cells at a time; default: as many as have room on the GPUs, or one per core without any.",
        group="Machine",
    )
    mlflow_uri: str | None = setting(
        None, "MLflow tracking server; default: the workspace's own database.", group="Tracking"
    )
    experiment: str | None = setting(None, "MLflow experiment; default: the name of the file.", group="Tracking")
    system_metrics: bool = setting(
        False,
        "Log the load of this machine's processors, memory, disk and GPUs beside every run in MLflow, too.",
        group="Tracking",
    )


def _check_probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:  # nor NaN
        raise UserError(f"--{name} is a probability from 0 to 1, not {value}.")


@dataclass(frozen=True)
class AlignSettings:
    """Raw photos into upright face crops."""

    name: str = setting("", "Name of the new manifest in this workspace.", required=True)
    out: str | None = setting(None, "Folder or URI for the crops; default: aligned/NAME in the workspace.")
    size: Side = setting(224, "Side of a crop in pixels.")
    faces: Literal["largest", "all"] = setting("largest", "Which faces of a photo to use.")
    smallest: Count = setting(32, "Narrowest face to use, in pixels of the photo.")
    confidence: float = setting(0.9, "Least confidence (0–1) at which something found counts as a face.")

    def check(self) -> None:
        """Raise `UserError` for a confidence that is none."""
        _check_probability("confidence", self.confidence)


@dataclass(frozen=True)
class PredictSettings:
    """A trained model on photos and videos."""

    model: str | None = setting(
        None,
        "Run of this workspace or its unambiguous beginning, folder of `cafe export`, model that ships, or address of "
        "MLflow's such as models:/faces/1; default: the newest that ships.",
    )
    best: Literal["source_val"] | None = setting(
        None, "The model is an experiment: take its run with the best accuracy on held-out faces of the source."
    )
    ensemble: bool = setting(False, "Average all seeds of the run.")
    flip: bool = setting(False, "Average every face with its mirror image.")
    aligned: bool = setting(False, "Every picture is one face, cropped and upright already: look for none.")
    faces: Literal["largest", "all"] = setting("all", "Which faces of a picture to predict.")
    smallest: Count = setting(20, "Narrowest face to predict, in pixels of the picture.")
    confidence: float = setting(0.9, "Least confidence (0–1) at which something found counts as a face.")
    threshold: float | None = setting(
        None,
        "Probability (0–1) of its expression below which a face is marked unsure; default: what the model reaches on four "
        "in five faces held out of its own source.",
    )
    rate: float = setting(5.0, "Frames a second to look at in a video.")
    format: Literal["table", "jsonl", "json", "csv", "parquet"] | None = setting(
        None, "How rows are written; default: as the name of --output says, else a table."
    )
    output: str | None = setting(None, "File to write the rows to; default: standard output.")
    annotate: str | None = setting(None, "Folder for copies of the pictures and videos with boxes and labels.")
    use_gpu: bool | None = setting(None, "Predict on a GPU; default: when there is one.", flag="--gpu/--cpu")

    def check(self) -> None:
        """Raise `UserError` for a number that is none of those it may be, NaN among them, and for other faces."""
        if not self.rate > 0:
            raise UserError(f"--rate is a number of frames a second above 0, not {self.rate}.")
        _check_probability("confidence", self.confidence)
        if self.threshold is not None:
            _check_probability("threshold", self.threshold)
        if self.faces not in ("largest", "all"):
            raise unknown("choice of --faces", self.faces, ("largest", "all"))


@dataclass(frozen=True)
class ExportSettings:
    """A trained run as a folder for other programs."""

    output: str | None = setting(
        None, "Where to write it; default: exports/RUN in the workspace, named after its options too.", metavar="FOLDER"
    )
    ensemble: bool = setting(False, "Average all seeds of the run, in the graph and wherever the folder is loaded.")
    flip: bool = setting(False, "Average every face with its mirror image, likewise.")
    weights: Literal["float32", "float16"] = setting(
        "float32", "Number format of the method's weights; float16: half the size, rounded."
    )
    graph: bool = setting(
        True, "Write the ONNX graph; without it this package is needed to predict.", flag="--graph/--no-graph"
    )
    about: str | None = setting(None, "Markdown to put into the model card, below its title.", metavar="FILE")
    mlflow: bool = setting(False, "Log the exported model in MLflow too, with signature and input example.")
    register: str | None = setting(
        None, "Log it and register it under this name in MLflow's model registry.", metavar="NAME"
    )
    mlflow_uri: str | None = setting(None, "MLflow tracking server; default: the workspace's own database.")

    def check(self) -> None:
        """Raise `UserError` for a name that MLflow's registry does not take, before anything is exported."""
        name = self.register
        if name is not None and (name.strip() in ("", ".", "..") or set(name) & set("/:'\"")):
            raise UserError(f"--register {name!r} is no name of a model: take one without '/', ':' and quotes.")


@dataclass(frozen=True)
class DemoSettings(ClusterSettings):
    """The benchmark demo.toml, on drawn faces or on folders of one's own."""

    GROUP: ClassVar[str] = "Data"

    faces: tuple[str, ...] = setting(
        (), "Folder of your own faces, EXPRESSION/*.jpg, instead of drawn ones; the first is trained on. Repeatable.",
        multiple=True, metavar="[NAME=]FOLDER",
    )  # fmt: skip
    drawn: Annotated[int, Interval(ge=112, le=28_000)] = setting(500, "Faces to draw of each domain.")
    seeds: Count | None = setting(None, "Seeds per method; default: those of demo.toml.", group="What is trained")
    epochs: Count | None = setting(
        None, "Epochs of every training; default: those of demo.toml.", group="What is trained"
    )
