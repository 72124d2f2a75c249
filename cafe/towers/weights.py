"""Weights files: fetch them, read them safely, and name them by their content.

Weights files come from anywhere, so nothing in them is ever executed; the digest of what was read goes into the cache key,
so that a feature can always be traced to its tower.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor
from upath import UPath

from cafe.errors import UserError, quote
from cafe.files import MOST_TEXT, read_file, write_file
from cafe.seals import BLANK, KEY, check_seal, damaged, seal
from cafe.towers.face import read_face_weights
from cafe.towers.names import (
    CONFIG,
    FOLDER,
    HUB,
    IN_FOLDER,
    WEIGHTS,
    BackboneSpec,
    parse_backbone,
    single_names,
    timm_name,
)

# What zipfile, pickle and torch raise for a file that is damaged, or holds something else than tensors by their names.
UNREADABLE = (
    RuntimeError, EOFError, AttributeError, LookupError, ValueError, TypeError, UnpicklingError, zipfile.BadZipFile,
)  # fmt: skip


def read_weights(name: str, spec: BackboneSpec) -> dict[str, Tensor]:
    """Return all tensors of a tower's weights file, fetched from the hub where no file is named."""
    if spec.library == "dlib":
        return read_face_weights(str(spec.file))
    return read_state_dict(spec.file or _fetch(name, spec, _locate(spec)[2]))


def find_weights(name: str) -> str | None:
    """Return where the weights of a tower lie on this machine, None where they would have to be fetched.

    Raises `UserError` for an unknown tower or a file that is not there. Nothing is fetched.
    """
    import huggingface_hub

    for single in single_names(name):
        spec = parse_backbone(single)
        needed = [] if spec.file or spec.library == "dlib" else [_locate(spec)]
        if spec.model.startswith(HUB):
            needed.append((spec.model.removeprefix(HUB), None, [CONFIG]))
        for repository, revision, files in needed:
            cached = (huggingface_hub.try_to_load_from_cache(repository, file, revision=revision) for file in files)
            if not repository or not any(isinstance(path, str) for path in cached):
                return None
    return name


def find_configuration(name: str, spec: BackboneSpec) -> Path:
    """Return the `config.json` beside the weights of a tower, fetched from the hub where it is there; raise `UserError`.

    It is one of timm's, and names one of its architectures; nothing else of it is checked.
    """
    import timm

    if spec.model.startswith(HUB):
        path = Path(_fetch(name, spec, [CONFIG]))
    else:
        path = Path(spec.model.removeprefix(FOLDER)) / CONFIG
    try:
        content = json.loads(read_file(UPath(path), MOST_TEXT))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"The configuration of '{name}' cannot be read ({quote(error)}): fetch it again.") from error
    architecture = content.get("architecture") if isinstance(content, dict) else None
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise UserError(
            f"The configuration of '{name}' names no architecture of timm, but {architecture!r}: give a repository that "
            "is made for timm."
        )
    return path


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a `.safetensors` file or of a `.pt`, `.pth`, `.bin` file written by `torch.save`.

    A state dict may be wrapped in `state_dict` or `model` and its names may start with `module.`; both are taken off.
    Raises UserError when the file is missing, damaged, a TorchScript archive or holds no tensors.
    """
    from safetensors import SafetensorError
    from timm.models import load_state_dict

    path = Path(path)
    if not path.is_file():
        raise UserError(f"No weights file at '{path}': check the path, or leave the file out to use published weights.")
    try:
        if _is_script(path):
            raise UserError(
                f"The weights file '{path}' is a TorchScript archive, which runs code when it is opened: "
                "save its state_dict as a .safetensors file and give that."
            )
        content = load_state_dict(str(path), use_ema=False, weights_only=True)
    except (SafetensorError, *UNREADABLE) as error:
        objects = _list_objects(path)
        reason = f"it holds {objects[0]}, an object of Python" if objects else quote(error).partition(". ")[0]
        remedy = "" if objects else "fetch it again, or "
        raise UserError(
            f"The weights file '{path}' cannot be read as plain tensors ({reason}): {remedy}save its state_dict as a "
            ".safetensors file."
        ) from error
    tensors = {str(name): tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    if not tensors:
        raise UserError(f"The weights file '{path}' holds no tensors by name: give a file made from a state_dict.")
    return tensors


def _list_objects(path: Path) -> list[str]:
    """Return the classes of a file of `torch.save` that are no tensors, such as a whole model's, which would run code."""
    with suppress(*UNREADABLE):  # of another kind of archive, or a damaged one
        if zipfile.is_zipfile(path):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    return []


def _is_script(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def fetch_weights(repository: str, revision: str | None, files: list[str]) -> str:
    """Return the local path of the first of `files` a repository of the Hugging Face hub has, downloading it once.

    Raises ConnectionError, with the reason in one line, when the hub cannot be reached or refuses.
    """
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, HTTPError  # type: ignore[attr-defined]

    for file in files:
        cached = huggingface_hub.try_to_load_from_cache(repository, file, revision=revision)
        if isinstance(cached, str):
            return cached
    reason: Exception | None = None
    for file in files:
        address = huggingface_hub.hf_hub_url(repository, file, revision=revision)
        try:
            # A download tries an unreachable hub again for most of a minute; this request gives up at once.
            huggingface_hub.get_hf_file_metadata(address, timeout=10)
            return huggingface_hub.hf_hub_download(repository, file, revision=revision)
        except EntryNotFoundError as error:
            reason = error
        except (OSError, HTTPError) as error:
            raise ConnectionError(quote(error)) from error
    raise ConnectionError(f"it has none of {', '.join(files)}") from reason


def _fetch(name: str, spec: BackboneSpec, files: list[str]) -> str:
    """Return where the first of some files lies that a tower's repository has, fetched once."""
    repository, revision, _ = _locate(spec)
    by_file = f"'{spec.library}:{spec.model}@FILE'"
    if not repository:
        raise UserError(f"The weights of '{name}' are on no hub: get them from their authors and write {by_file}.")
    elsewhere = (
        f"its files elsewhere and write '{IN_FOLDER}DIRECTORY'"
        if spec.configured
        else f"them elsewhere and write {by_file}"
    )
    try:
        return fetch_weights(repository, revision, files)
    except ConnectionError as error:
        raise UserError(
            f"Cannot fetch the weights of '{name}' from their hub ({error}): download {elsewhere}, or use "
            "'face-resnet' or 'imagenet-lite0', whose weights come with the installation."
        ) from error


def _locate(spec: BackboneSpec) -> tuple[str, str | None, list[str]]:
    """Return repository, revision and the names of the weights to look for, the safe format first."""
    if spec.library == "open_clip":
        import open_clip

        location = open_clip.get_pretrained_cfg(spec.model, spec.tag).get("hf_hub", "")
        repository, _, file = location.rpartition("/")
        return repository, None, [file] if file else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    if spec.configured:
        return spec.model.removeprefix(HUB), None, list(WEIGHTS)
    import timm

    config: Any = timm.get_pretrained_cfg(timm_name(spec))
    repository, _, revision = (config.hf_hub_id or "").partition("@")
    return repository, revision or None, [config.hf_hub_filename] if config.hf_hub_filename else list(WEIGHTS)


def digest_state_dict(tensors: Mapping[str, Tensor], arguments: Mapping[str, Any] | None = None) -> str:
    """Return the SHA-256 (hexadecimal) of names, types, shapes and values, whatever file they came from.

    `arguments` are those of a configuration beside the weights: they can change features and no tensor.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    if arguments:
        digest.update(json.dumps(arguments, sort_keys=True).encode())
    return digest.hexdigest()


def write_tensors(path: UPath, tensors: dict[str, Tensor]) -> None:
    """Write named tensors as one safetensors file that carries a seal."""
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    write_file(path, seal(save(plain, {KEY: BLANK})))


def read_tensors(path: UPath, remedy: str = "write it again") -> dict[str, Tensor]:
    """Read named tensors from a safetensors file; raise `DamagedError` with what to do when it is not what was written."""
    from safetensors import SafetensorError

    content = read_file(path)
    check_seal(content, path, remedy)
    try:
        return dict(load(content))
    except SafetensorError:
        raise damaged(path, remedy) from None
