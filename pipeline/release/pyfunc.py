"""An exported run as a model of MLflow: pictures of faces in, expressions out, in Python or served over HTTP.

MLflow loads it through this module of the installed package, from safetensors and JSON: nothing is unpickled.
A record is the bytes of an image file in a column `image`, or these in base64, as they are sent over HTTP.
"""

from __future__ import annotations

import base64
import io
import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from upath import UPath

from cafe.data.images import UnreadableImageError, decode_image
from cafe.errors import UserError
from cafe.files import place_below
from cafe.inference.output import name_columns
from cafe.pipeline.models import build_model, name_files, read_averages
from cafe.pipeline.process.progress import Progress
from cafe.pipeline.release.export import export_run
from cafe.pipeline.runs import read_model
from cafe.pipeline.tracking.mirror import Mirror, find_run, quiet_mlflow
from cafe.pipeline.tracking.pages import NOTE, list_model_scores
from cafe.pipeline.workspace import Workspace
from cafe.records import digest
from cafe.results.runs import Run
from cafe.results.scores import meet, read_scores

if TYPE_CHECKING:
    import pandas as pd

LONGEST_NOTE = 5000  # characters of a description that MLflow takes
COLUMN = "image"
ABOUT = "Classifiers of facial expressions, exported by cafe. The description of each version is its model card."


class Pyfunc:
    """What MLflow calls."""

    def __init__(self, folder: UPath) -> None:
        self.model = build_model([folder])

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Return for each record the most probable class, the probability of each and, where it is no image, why instead.

        A record that cannot be read fails alone: its class and probabilities are None, and `error` says what to send.
        """
        import pandas as pd

        faces, errors = list[Any](), list[str | None]()
        for content in model_input[COLUMN]:
            try:
                faces.append(decode_image(read_content(content)))
                errors.append(None)
            except (UserError, UnreadableImageError) as error:
                errors.append(f"This is no image ({error}): send the bytes of an image file, over HTTP in base64.")
        classes = self.model.classes
        probabilities = self.model.predict(faces).astype(float)
        table = pd.DataFrame(probabilities, columns=list(name_columns(classes).values()))
        table.insert(0, "expression", [classes[label] for label in probabilities.argmax(axis=1)])
        if len(faces) < len(errors):
            table.index = pd.Index([place for place, error in enumerate(errors) if error is None])
            table = table.reindex(range(len(errors))).astype(object)
            table = table.where(table.notna(), None)
        return table.assign(error=pd.Series(errors, dtype=object))


def read_content(content: object) -> bytes:
    """Return the bytes of a record: as they are, or from base64, with or without what a data URI has in front.

    Raises `UserError` for anything else.
    """
    if isinstance(content, bytes | bytearray | memoryview | np.bytes_):
        return bytes(content)
    if not isinstance(content, str):
        nothing = content is None or content != content  # pandas writes NaN for what is left out
        raise UserError("nothing" if nothing else f"a value of the type {type(content).__name__}")
    try:
        return base64.b64decode(content.partition(";base64,")[2] or content, validate=True)
    except ValueError:
        raise UserError(f"a text that is no base64, {content[:20]!r}…") from None


def _load_pyfunc(path: str) -> Pyfunc:
    """Load an exported folder; MLflow looks for this name."""
    return Pyfunc(UPath(path))


def log_model(mirror: Mirror, run_folder: UPath, exported: UPath, register: str | None = None) -> str:
    """Log an exported run as the model of its run in MLflow, once, and register it where a name is given.

    Returns the sentence to print. Raises `UserError` when the server cannot be reached.
    """
    run = mirror.update(run_folder)
    if mirror.warning:
        raise UserError(mirror.warning)
    assert run is not None
    tags, experiment = describe_tags(run) | describe_averages(exported), min(run.experiments)
    card = (exported / "README.md").read_text(encoding="utf-8")[:LONGEST_NOTE]
    with quiet_mlflow() as mlflow, mirror.as_default(mlflow):
        client = mlflow.MlflowClient()
        place = client.get_experiment_by_name(experiment).experiment_id
        run_id = find_run(client, place, run.name).info.run_id
        weights = digest_model(exported)[:32]
        there = client.search_logged_models(
            [place], f"source_run_id = '{run_id}' AND tags.`cafe.weights` = '{weights}'"
        )
        if not there:  # in the experiment of the run, which MLflow would not look for by itself
            about = {**tags, "cafe.weights": weights}
            name = re.sub(r"[/:.%\"']", "-", run.name)  # signs that MLflow refuses
            params = {"source": run.source, **{key: str(value) for key, value in run.settings.items()}}
            logged = client.create_logged_model(place, name, run_id, {**about, NOTE: card}, params)
            _log(mlflow, run_id, logged.model_id, exported)
        model = there[0] if there else logged
        _log_scores(mlflow, run_id, model.model_id, mirror.workspace, run)
        uri = model.model_uri
        said = f"MLflow at {mirror.shown_address} holds the model {uri} of the run {run.name}"
        if register is None:
            return f"{said}."
        known = client.search_model_versions(f"name = '{register}' AND run_id = '{run_id}'")
        version = known[0] if known and there else mlflow.register_model(uri, register, tags=tags)
        client.update_model_version(register, version.version, card)
        if not client.get_registered_model(register).description:
            client.update_registered_model(register, ABOUT)
        return f"{said}, registered as models:/{register}/{version.version}."


def log_models(mirror: Mirror, progress: Progress) -> dict[str, str]:
    """Log the model of every run of the workspace, exporting those that are not yet; return why others have none, by run."""
    workspace, left_out = mirror.workspace, dict[str, str]()
    names = workspace.run_names()
    for number, name in enumerate(names):
        progress(number, len(names))
        folder = place_below(workspace.root / "exports", name)
        try:
            if not (folder / "model.json").exists():
                export_run(workspace, name, folder)
            log_model(mirror, workspace.run_path(name), folder)
        except UserError as error:
            left_out[name] = str(error)
    progress(len(names), len(names))
    return left_out


def _log_scores(mlflow: Any, run_id: str, model_id: str, workspace: Workspace, run: Run) -> None:
    """Have a model list the data sets that its run was evaluated on, with metrics: the very points of the run."""
    client, known = mlflow.MlflowClient(), workspace.manifest_digests()
    listed = {(point.key, point.timestamp, point.step) for point in client.get_logged_model(model_id).metrics or ()}
    points = []
    for name, value, data_set, named in list_model_scores(read_scores(meet([run], known).runs, known)):
        logged = [point for point in client.get_metric_history(run_id, name) if point.value == value]
        if logged:
            moment, step = logged[-1].timestamp, logged[-1].step
            if (name, moment, step) not in listed:  # MLflow refuses to list a point again with another data set
                points.append(mlflow.entities.Metric(name, value, moment, step, model_id, data_set, named, run_id))
    client.log_batch(run_id, points)


def describe_tags(run: Run) -> dict[str, str]:
    """Return what tells a registered model from others."""
    about = {"source": run.source, "method": run.method, "seed": run.seed, "selection": run.selection, "run": run.name}
    about |= {"experiment": min(run.experiments), "commit": run.derived.get("code", "unknown")}
    return {f"cafe.{name}": str(value) for name, value in about.items()}


def describe_averages(exported: UPath) -> dict[str, str]:
    """Return what tells a model that averages several seeds or mirror images from that of its run alone, as tags."""
    seeds, mirrored = read_averages(exported)
    said = [f"{seeds} seeds"] * (seeds > 1) + ["mirror images"] * mirrored
    return {"cafe.averaged": ", ".join(said)} if said else {}


def digest_model(exported: UPath) -> str:
    """Name what a folder predicts: by its weights where it is one run, else by all of them and how they are averaged."""
    seeds, mirrored = read_averages(exported)
    weights = [digest((exported / name_files(number)[1]).read_bytes()) for number in range(1, seeds + 1)]
    return weights[0] if seeds == 1 and not mirrored else digest(json.dumps([weights, mirrored]).encode())


def _log(mlflow: Any, run_id: str, model_id: str, exported: UPath) -> None:
    types, column = mlflow.types, mlflow.types.ColSpec
    described = read_model(exported)
    outputs = [column("double", name) for name in name_columns(described["labels"]).values()]
    outputs = [column("string", "expression"), *outputs, column("string", "error", required=False)]
    mlflow.models.Model.log(
        artifact_path=None,
        flavor=mlflow.pyfunc,
        run_id=run_id,
        model_id=model_id,
        # The epoch, whose losses MLflow lists. At 0 it would list the scores, without the data sets they are of.
        step=max(1, (described.get("trained") or {}).get("epochs", 1)),
        loader_module=__name__,
        data_path=str(exported),
        signature=mlflow.models.ModelSignature(types.Schema([column("string", COLUMN)]), types.Schema(outputs)),
        input_example=draw_example(),
        pip_requirements=[f"cafe-fer=={described['versions']['cafe']}"],
    )


def draw_example() -> pd.DataFrame:
    """Return a record as it is sent: a grey picture, which shows no person, in base64.

    The signature says text, too: what it calls binary, MLflow decodes for some forms of a request and not for others, and a
    record that it cannot decode fails all.
    """
    import pandas as pd

    content = io.BytesIO()
    Image.fromarray(np.full((112, 112, 3), 128, np.uint8)).save(content, "PNG")
    return pd.DataFrame({COLUMN: [base64.b64encode(content.getvalue()).decode()]})
