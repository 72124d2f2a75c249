"""Every file that decides a number says when a bit of it is another."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Cafe, complaint
from runs import write_predictions, write_run
from upath import UPath

from cafe.errors import DamagedError
from cafe.files import write_file, write_json
from cafe.learning.checkpoints import load_checkpoint, save_checkpoint
from cafe.pipeline.models import check_finite
from cafe.pipeline.release.catalogue import TRAINED, list_models
from cafe.pipeline.runs import MODEL_FORMAT, is_finished, read_model
from cafe.pipeline.workspace import Workspace
from cafe.records import digest
from cafe.results.runs import choose, read_runs
from cafe.seals import BLANK, KEY, read_sealed, seal, verify_file, write_sealed
from cafe.towers.weights import read_tensors, write_tensors


def flip(path: UPath, place: int, bit: int = 0) -> bytes:
    """Change one bit of a file; return what it was."""
    whole = path.read_bytes()
    content = bytearray(whole)
    content[place] ^= 1 << bit
    path.write_bytes(bytes(content))
    return whole


@pytest.mark.parametrize("name", ["x.safetensors", "x.json"])
def test_no_flipped_bit_is_read(tmp_path: Path, name: str) -> None:
    """Also none of the seal itself, or of its name, which would make it look like a file from before there were seals."""
    path = UPath(tmp_path / name)
    if name == "x.json":
        write_sealed(path, {"about": "the café", "digest": "0" * 64, "loss": math.inf})
    else:
        write_tensors(path, {"classifier.bias": torch.arange(3.0), "count": torch.tensor(7)})
    for place in range(len(path.read_bytes())):
        whole = flip(path, place, place % 8)
        assert verify_file(path) == "damaged", place
        path.write_bytes(whole)
    path.write_bytes(whole[:-1])
    assert verify_file(path) == "damaged"
    path.write_bytes(whole)
    assert verify_file(path) == "whole"


def test_weights_and_records_from_before_are_read_and_called_unchecked(tmp_path: Path) -> None:
    from safetensors.torch import save

    (tmp_path / "x.safetensors").write_bytes(save({"bias": torch.ones(2)}))
    (tmp_path / "x.json").write_text('{"b": 1, "a": 2}')
    assert read_tensors(UPath(tmp_path / "x.safetensors"))["bias"].tolist() == [1, 1]
    assert read_sealed(UPath(tmp_path / "x.json"), "read") == {"b": 1, "a": 2}
    assert "is not what was written" in complaint(read_sealed, UPath(tmp_path / "x.json"))
    assert [verify_file(UPath(tmp_path / name)) for name in ("x.safetensors", "x.json")] == ["unchecked"] * 2


@pytest.mark.parametrize(
    ("name", "place"),
    [("state.json", -30), ("state.safetensors", -2)],  # in a number, which alone would look like another
)
def test_a_checkpoint_with_a_changed_bit_is_not_resumed(tmp_path: Path, name: str, place: int) -> None:
    folder, layer = UPath(tmp_path), torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    save_checkpoint(folder, layer, optimizer, {"epoch": 1}, {"weight": torch.ones(1)})
    assert load_checkpoint(folder, layer, optimizer)[0] == {"epoch": 1}
    flip(folder / name, place)
    with pytest.raises(DamagedError, match=rf"{name} is damaged.*: remove .* and give the `cafe train` command again"):
        load_checkpoint(folder, layer, optimizer)


def test_verify_lists_what_is_damaged_and_what_was_never_checked(tmp_path: Path) -> None:
    workspace = Workspace.at(str(tmp_path))
    run, cafe = write_run(workspace), Cafe(tmp_path, "")
    write_predictions(run, "fer", np.arange(7), np.arange(7))
    write_tensors(run / "model.safetensors", {"bias": torch.zeros(7)})
    assert "3 files: every byte is what was written" in cafe.succeed("runs", "--verify")
    flip(run / "model.safetensors", -2)
    (run / "result.json").write_text("{}")
    said = cafe.fail("runs", "--verify", run.name, code=1)
    assert f"runs/{run.name}/result.json: unchecked" in said
    assert "1 files are not what was written: index, evaluate, train or export again what they belong to.\n" in said
    assert said.endswith(f"\n  runs/{run.name}/model.safetensors")
    found = json.loads(cafe("runs", "--verify", "--json").output.partition("\nError")[0])
    assert [len(found[state]) for state in ("whole", "unchecked", "damaged")] == [2, 1, 1]
    assert f"Unknown run, manifest or exported folder 'x': choose {run.name}." in cafe.fail("runs", "--verify", "x")


def test_an_exported_folder_is_verified_by_its_own_record(tmp_path: Path) -> None:
    workspace = Workspace.at(str(tmp_path))
    folder, cafe = workspace.root / "exports" / "model", Cafe(tmp_path, "")
    for name in ("model.onnx", "run.json"):
        write_file(folder / name, name.encode())
    write_sealed(folder / "model.json", {"files": {name: digest(name.encode()) for name in ("model.onnx", "run.json")}})
    for names in ((str(folder),), ()):
        assert "3 files: every byte is what was written" in cafe.succeed("runs", "--verify", *names)
    flip(folder / "model.onnx", 0)
    (folder / "run.json").unlink()
    write_file(folder / "run.json", b"another")
    for names in ((str(folder),), ()):
        said = cafe.fail("runs", "--verify", *names, code=1)
        assert said.startswith("1 files: every byte")
        assert said.endswith(f"\n  {folder}/model.onnx\n  {folder}/run.json")


def test_a_model_record_without_its_seal_is_named_or_where_it_must_have_one_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = UPath(tmp_path)
    write_sealed(folder / "model.json", {"threshold": 0.5, "format": MODEL_FORMAT})
    assert read_model(folder)["threshold"] == 0.5
    write_json(folder / "model.json", {"threshold": 0.1, "format": MODEL_FORMAT})
    assert f"{folder}/model.json is damaged or was changed" in complaint(read_model, folder)
    assert not caplog.messages
    exported = Workspace.at(str(tmp_path / "work")).root / "exports" / "x"
    for name in ("model.json", "run.json"):
        write_json(exported / name, {"format": MODEL_FORMAT})
    assert not [one for one in list_models(Workspace.at(str(tmp_path / "work"))) if one["is"] == "exported"]
    assert caplog.messages[0].startswith(f"A model is left out: {exported}/model.json is damaged")
    caplog.clear()
    write_json(folder / "model.json", {"threshold": 0.5, "format": 1})
    assert [read_model(folder)["threshold"] for _ in range(2)] == [0.5, 0.5]
    (said,) = caplog.messages  # once for a command
    assert said.startswith(f"{folder}/model.json is unchecked: it has no seal")


@pytest.mark.parametrize("content", [b"", b"{", b'{"seal": "0"}'])
def test_a_run_whose_end_is_damaged_is_neither_finished_nor_dropped(tmp_path: Path, content: bytes) -> None:
    run = write_run(Workspace.at(str(tmp_path)))
    assert not is_finished(run)
    write_sealed(run / "result.json", {"epochs": 1})
    assert is_finished(run)
    (run / "result.json").write_bytes(content)
    for ended in (lambda: is_finished(run), lambda: choose(read_runs([run]), name=run.name)):
        assert "result.json is damaged or was changed, it is not what was written: remove it and giv" in complaint(
            ended
        )


def test_one_damaged_run_leaves_the_other_models_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    workspace = Workspace.at(str(tmp_path))
    whole, other = write_run(workspace), write_run(workspace, seed=1)
    write_sealed(whole / "result.json", {"epochs": 1})
    (other / "result.json").write_bytes(b"{")
    assert [one["model"] for one in list_models(workspace) if one["is"] == TRAINED] == [whole.name]
    assert caplog.messages[0].startswith(f"A model is left out: {other}/result.json is damaged")
    write_predictions(whole, "raf", np.zeros(4, np.int64), np.zeros(4, np.int64))
    (file,) = (whole / "predictions").iterdir()
    file.write_bytes(b"PAR1")
    assert [one["model"] for one in list_models(workspace) if one["is"] == TRAINED] == [whole.name]
    assert any(said.startswith("Accuracies are not known: ") for said in caplog.messages)


def test_weights_that_are_no_numbers_are_refused_and_infinite_buffers_kept(tmp_path: Path) -> None:
    layer = torch.nn.BatchNorm1d(2)
    layer.running_var.fill_(math.inf)  # as the spread of a feature that never changes
    check_finite(layer, UPath("m"))
    for value in (math.nan, math.inf):
        layer.bias.data[1] = value
        assert "m holds weights that are NaN or infinite, 'bias' among 1" in complaint(check_finite, layer, UPath("m"))


def test_the_seal_is_of_all_but_its_digits() -> None:
    content = f"begin {KEY} {BLANK} end".encode()
    sealed = seal(content)
    assert len(sealed) == len(content)
    assert sealed.replace(sealed[sealed.index(b"cafe-seal:") + 10 :][:64], b"0" * 64) == content
