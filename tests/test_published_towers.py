"""Towers in the formats their authors publish: repositories of timm's hub, FaRL, EmotiEffLib; and the list of towers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor
from upath import UPath

from cafe.data.readers import DATASETS
from cafe.errors import UserError
from cafe.jobs.cli import main
from cafe.pipeline.features.extract import look_up_tower
from cafe.pipeline.settings import ExtractSettings
from cafe.pipeline.workspace import Workspace
from cafe.towers.building import load_backbone
from cafe.towers.catalogue import PUBLISHED, list_towers
from cafe.towers.facts import NORMALISATIONS
from cafe.towers.keeping import find_tower, keep_tower
from cafe.towers.names import BACKBONES, absolute_name, parse_backbone, short_name
from cafe.towers.weights import find_weights

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}
FAMILIES: dict[str, dict[str, Any]] = {  # of the published ones, in small: what a repository's configuration says
    "vit_base_patch16_siglip_224": SMALL,
    "vit_base_patch16_dinov3": {**SMALL, "embed_dim": 96},
    "vit_pe_core_base_patch16_224": {**SMALL, "embed_dim": 96},
    "aimv2_large_patch14_224": SMALL,
    "vit_huge_patch14_clip_quickgelu_224": SMALL,
    "convnext_tiny": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]},
}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
VISION = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}


def publish(folder: Path, architecture: str, arguments: dict[str, Any], **published: Any) -> Any:
    """Write a repository as timm's hub has it, with drawn weights; return the model."""
    torch.manual_seed(0)
    model = timm.create_model(architecture, **arguments).eval()
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    keys = ("input_size", "mean", "std", "interpolation", "classifier", "fixed_input_size", "first_conv")
    config = {key: model.pretrained_cfg.get(key) for key in keys} | published
    record = {"architecture": architecture, "num_classes": model.num_classes, "pretrained_cfg": config}
    (folder / "config.json").write_text(json.dumps({**record, "model_args": arguments}))
    return model


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_family_is_read_from_a_folder_as_its_library_reads_it(architecture: str, tmp_path: Path) -> None:
    model = publish(tmp_path / "tiny", architecture, FAMILIES[architecture], mean=[0.1, 0.2, 0.3])
    tower = load_backbone(f"timm:local-dir:{tmp_path / 'tiny'}")
    facts = tower.facts
    images = torch.randn(1, 3, facts.input_size, facts.input_size)
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
        pooled, features = tower(images, with_map=True)
    assert torch.allclose(pooled, expected, atol=1e-5)
    assert torch.allclose(tower(images)[0], expected, atol=1e-5)
    assert features.shape[1:] == facts.map_shape
    assert facts.architecture == f"timm:{architecture}"
    assert (facts.mean, facts.std) == ((0.1, 0.2, 0.3), tuple(model.pretrained_cfg["std"]))
    assert facts.input_size == model.pretrained_cfg["input_size"][-1]
    layers = 4 if architecture == "convnext_tiny" else 2
    assert tower.layers == (*(f"{'stage' if layers == 4 else 'block'}{n}" for n in range(1, layers + 1)), "final")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a repository `someone/tiny` in a cache of the hub, as its own library keeps it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    return repository / "snapshots" / ("a" * 40)


def test_a_repository_is_the_tower_its_files_are(hub: Path, tmp_path: Path) -> None:
    model = publish(hub, "test_resnet", {"global_pool": "max"})
    name = "timm:hf-hub:someone/tiny#stage3/2x2"
    tower, here = load_backbone(name), load_backbone(f"timm:local-dir:{hub}#stage3/2x2")
    assert tower.facts == here.facts  # so that what is extracted with the one serves the other
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        features = model.forward_intermediates(images, [2], intermediates_only=True)[0]
    assert torch.allclose(tower(images)[0], torch.nn.functional.adaptive_avg_pool2d(features, 2).flatten(1), atol=1e-5)
    assert find_weights(name) == name
    keep_tower(tower, UPath(tmp_path / "kept"))
    kept = find_tower(name, UPath(tmp_path / "kept"))
    assert kept == f"timm:local-dir:{tmp_path / 'kept'}@{tmp_path / 'kept' / 'tower.safetensors'}#stage3/2x2"
    assert load_backbone(kept).facts == tower.facts
    (hub / "config.json").unlink()
    assert find_weights(name) is None


def test_the_digest_names_what_a_configuration_says_besides(tmp_path: Path) -> None:
    for pool in ("avg", "max"):
        publish(tmp_path / pool, "test_resnet", {"global_pool": pool})
    assert (
        load_file(tmp_path / "avg" / "model.safetensors").keys()
        == load_file(tmp_path / "max" / "model.safetensors").keys()
    )
    average, most = (load_backbone(f"timm:local-dir:{tmp_path / pool}").facts.weights_digest for pool in ("avg", "max"))
    publish(tmp_path / "plain", "test_resnet", {})
    plain = load_backbone(f"timm:local-dir:{tmp_path / 'plain'}").facts
    assert len({average, most, plain.weights_digest}) == 3
    same = load_backbone(f"timm:test_resnet@{tmp_path / 'plain' / 'model.safetensors'}").facts
    assert (same.architecture, same.weights_digest) == (plain.architecture, plain.weights_digest)


def test_what_is_remembered_of_a_tower_ends_with_its_configuration(tmp_path: Path) -> None:
    publish(tmp_path / "tiny", "test_resnet", {})
    workspace, settings = (
        Workspace.at(str(tmp_path / "work")),
        ExtractSettings(backbone=f"timm:local-dir:{tmp_path / 'tiny'}"),
    )
    before = look_up_tower(workspace, settings)
    config = json.loads((tmp_path / "tiny" / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.1, 0.2, 0.3]
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config))
    assert look_up_tower(workspace, settings) == replace(before, mean=(0.1, 0.2, 0.3))


def test_the_folder_of_a_tower_is_absolute_in_its_name_and_left_out_of_the_short_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_name("timm:local-dir:some/tiny#block2") == f"timm:local-dir:{tmp_path}/some/tiny#block2/1x1"
    assert short_name("timm:local-dir:/a/b/tiny@/c/w.pt#block2/1x1") == "timm:local-dir:tiny#block2/1x1"


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ("not JSON", "configuration of .* cannot be read"),
        ("[]", "names no architecture of timm, but None"),
        ('{"architectures": ["SiglipModel"], "model_type": "siglip"}', "names no architecture of timm, but None"),
        ('{"architecture": "resnet19", "pretrained_cfg": {}}', "names no architecture of timm, but 'resnet19'"),
        (
            '{"architecture": "test_resnet", "pretrained_cfg": {}, "model_args": {"girth": 3}}',
            "timm cannot build what .* says .TypeError: .*girth",
        ),
        ('{"architecture": "test_resnet", "mean": "grey"}', "timm cannot build what .* says .ValueError"),
        ('{"architecture": "test_vit", "pretrained_cfg": {}}', r"do not fit .*[1-9]\d* tensors missing"),
        (
            '{"architecture": "test_vit", "pretrained_cfg": {}, "model_args": {"embed_dim": 1000000}}',
            "more than 4 times the values that its weights have",
        ),
        (
            '{"architecture": "test_resnet", "input_size": [3, 100000, 100000]}',
            "an input of other than 1 to 4096 pixels",
        ),
        ('{"architecture": "test_resnet", "input_size": [3, 16.5, 16.5]}', "an input of other than 1 to 4096 pixels"),
        ('{"architecture": "test_resnet", "std": [0, 1, 1]}', "by which no picture can be normalised"),
        (
            '{"architecture": "test_vit", "pretrained_cfg": {}, "model_args": {"num_heads": 0}}',
            "timm cannot build what .* says .ZeroDivisionError",
        ),
        (
            '{"architecture": "test_vit", "pretrained_cfg": {}, "model_args": {"mlp_ratio": Infinity}}',
            "what .* says .OverflowError",
        ),
        (None, "has no config.json: give one that holds what a repository of timm's does"),
    ],
)
def test_a_folder_that_holds_no_tower_is_refused(config: str | None, sentence: str, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    publish(folder, "test_resnet", {})
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_text(config)
    with pytest.raises(UserError, match=sentence) as caught:
        load_backbone(f"timm:local-dir:{folder}")
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights_takes_those_of_a_file(tmp_path: Path) -> None:
    publish(tmp_path / "tiny", "test_resnet", {})
    (tmp_path / "tiny" / "model.safetensors").rename(tmp_path / "mine.safetensors")
    assert (
        parse_backbone(f"timm:local-dir:{tmp_path}/tiny@{tmp_path}/mine.safetensors").file
        == f"{tmp_path}/mine.safetensors"
    )
    with pytest.raises(UserError, match=r"tiny' of the backbone .* has no model.safetensors or pytorch_model.bin"):
        parse_backbone(f"timm:local-dir:{tmp_path}/tiny")
    with pytest.raises(UserError, match=r"No weights file at '/nowhere\.pt'"):
        parse_backbone(f"timm:local-dir:{tmp_path}/tiny@/nowhere.pt")


def test_an_unreachable_repository_is_answered_with_the_way_out(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{filename}"
    )
    with pytest.raises(UserError) as caught:
        load_backbone("timm:hf-hub:someone/tiny")
    assert str(caught.value).startswith("Cannot fetch the weights of 'timm:hf-hub:someone/tiny' from their hub (")
    assert "download its files elsewhere and write 'timm:local-dir:DIRECTORY'" in str(caught.value)
    assert "\n" not in str(caught.value)


# --- what is downloaded by hand --------------------------------------------------------------------------------------


def farl_checkpoint(model: Any, width: int) -> dict[str, dict[str, Tensor]]:
    """Return a checkpoint as FaRL publishes it: with what filled masked patches in, and without all of its text tower."""
    tensors = {name: value for name, value in model.state_dict().items() if "token_embedding" not in name}
    more = {"mask_token": (width,), "lm_head.weight": (50, width), "lm_head.bias": (50,), "ln_lm.weight": (width,)}
    more |= {"ln_lm.bias": (width,), "lm_transformer.resblocks.0.attn.in_proj_weight": (3 * width, width)}
    return {"state_dict": {**tensors, **{f"visual.{name}": torch.randn(shape) for name, shape in more.items()}}}


@pytest.fixture
def farl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], str]:
    """Give FaRL's entry a tiny shape; return what writes a checkpoint and says the name of its tower."""
    config = {"embed_dim": 24, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT}
    (tmp_path / "tiny-farl.json").write_text(json.dumps(config))
    tiny = replace(BACKBONES["farl-vit-b16"], model=str(tmp_path / "tiny-farl.json"))
    monkeypatch.setitem(BACKBONES, "farl-vit-b16", tiny)

    def write(content: Any) -> str:
        torch.save(content, tmp_path / "FaRL.pth")
        return f"farl-vit-b16@{tmp_path / 'FaRL.pth'}"

    open_clip.add_model_config(tmp_path / "tiny-farl.json")
    return write


def test_farl_is_read_without_what_only_its_training_needed(farl: Callable[[Any], str]) -> None:
    model = open_clip.create_model("tiny-farl", load_weights=False).eval()
    tower = load_backbone(farl(farl_checkpoint(model, 32)))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(tower(images)[0], model.encode_image(images), atol=1e-6)
    assert (tower.facts.mean, tower.facts.std) == NORMALISATIONS["clip"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda tensors: tensors.pop("visual.ln_post.bias"), "1 tensors missing, 0 unexpected, .* 'ln_post.bias'"),
        (
            lambda tensors: tensors.update({"visual.fpn.weight": torch.ones(2)}),
            "0 tensors missing, 1 unexpected, .*'fpn.weight'",
        ),
        (
            lambda tensors: tensors.update({"visual.proj": torch.ones(32, 16)}),
            "1 of another shape, the first being 'proj'",
        ),
        (lambda tensors: tensors.clear(), "holds no tensors by name"),
    ],
)
def test_a_file_that_is_not_farl_s_is_refused(change: Any, sentence: str, farl: Callable[[Any], str]) -> None:
    content = farl_checkpoint(open_clip.create_model("tiny-farl", load_weights=False), 32)
    change(content["state_dict"])
    with pytest.raises(UserError, match=sentence):
        load_backbone(farl(content))


def test_farl_s_published_shape_is_that_of_its_entry() -> None:
    wide, depth = 768, 12  # `load_farl("base", …)` of the released code
    shapes = {"class_embedding": (wide,), "positional_embedding": (197, wide), "proj": (wide, 512)}
    shapes |= {"conv1.weight": (wide, 3, 16, 16)} | {
        f"ln_{at}.{part}": (wide,) for at in ("pre", "post") for part in ("weight", "bias")
    }
    block = {"attn.in_proj_weight": (3 * wide, wide), "attn.in_proj_bias": (3 * wide,), "mlp.c_fc.bias": (4 * wide,)}
    block |= {
        "attn.out_proj.weight": (wide, wide),
        "mlp.c_fc.weight": (4 * wide, wide),
        "mlp.c_proj.weight": (wide, 4 * wide),
    }
    block |= {f"{part}.bias": (wide,) for part in ("attn.out_proj", "ln_1", "ln_2", "mlp.c_proj")}
    block |= {"ln_1.weight": (wide,), "ln_2.weight": (wide,)}
    shapes |= {f"transformer.resblocks.{n}.{name}": shape for n in range(depth) for name, shape in block.items()}
    model = BACKBONES["farl-vit-b16"].model
    with torch.device("meta"):
        tower = open_clip.create_model(model, load_weights=False, device="meta").visual
    assert {name: tuple(value.shape) for name, value in tower.state_dict().items()} == shapes
    assert open_clip.get_model_config(model)["quick_gelu"]  # as its blocks are


def test_the_faces_of_emotiefflib_are_a_plain_state_dict(tmp_path: Path) -> None:
    model = timm.create_model("tf_efficientnet_b0").eval()
    model.classifier = torch.nn.Identity()
    torch.save(model.state_dict(), tmp_path / "state_vggface2_enet0_new.pt")
    tower = load_backbone(f"vggface2-b0@{tmp_path / 'state_vggface2_enet0_new.pt'}", input_size=64)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(tower(images)[0], model(images), atol=1e-6)
    assert (tower.facts.mean, tower.facts.std) == NORMALISATIONS["imagenet"]  # as its training notebook has them
    torch.save(model, tmp_path / "enet_b0_8_best_afew.pt")  # its other files hold a whole model, which is code
    with pytest.raises(
        UserError, match=r"plain tensors \(it holds timm\.[\w.]+, an object of Python\): save its state_dict"
    ) as caught:
        load_backbone(f"vggface2-b0@{tmp_path / 'enet_b0_8_best_afew.pt'}")
    assert "\n" not in str(caught.value)


# --- the list --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_list_says_what_timm_says(name: str) -> None:
    card, spec = PUBLISHED[name], parse_backbone(name)
    with torch.device("meta"):
        model: Any = timm.create_model(name.removeprefix("timm:"), num_classes=0)
    assert sum(value.numel() for value in model.parameters()) == card.parameters
    assert model.num_features == card.channels
    assert model.pretrained_cfg["input_size"][-1] == card.input_size
    assert model.pretrained_cfg["license"] == card.licence.lower()
    assert spec.tag


@pytest.mark.parametrize("name", BACKBONES)
def test_the_list_says_what_a_named_tower_is(name: str) -> None:
    spec, card = BACKBONES[name], BACKBONES[name].card
    assert card
    assert set(card.may_have_seen) <= DATASETS.keys()
    if spec.package:
        tower = load_backbone(name)
        assert (tower.facts.input_size, tower.facts.width) == (card.input_size, card.channels)
        assert sum(value.numel() for value in tower.tower.parameters()) == card.parameters
        return
    with torch.device("meta"):
        if spec.library == "timm":
            model: Any = timm.create_model(spec.model, num_classes=0)
            size, channels = model.pretrained_cfg["input_size"][-1], model.num_features
        else:
            model = open_clip.create_model(spec.model, load_weights=False, device="meta").visual
            size, channels = model.image_size[0], model.output_dim
    assert (size, channels) == (card.input_size, card.channels)
    assert sum(value.numel() for value in model.parameters()) == card.parameters


def test_cafe_tower_list_shows_them_all() -> None:
    result = CliRunner().invoke(main, ["tower", "list", "--json"])
    records = {record["tower"]: record for record in json.loads(result.output)}
    assert list(records) == [*BACKBONES, *PUBLISHED]
    assert records["face-resnet"]["weights"] == "installed"
    assert records["clip-vit-b32"]["weights"] == "hub"
    assert records["farl-vit-b16"]["download"].startswith("FaRL-Base-Patch16-LAIONFace20M-ep64.pth")
    assert records["imagenet-lite0"]["may_have_seen"] == []
    shown = CliRunner().invoke(main, ["--wide", "tower", "list"]).output
    assert all(name in shown for name in records)
    assert "pictures of affectnet, expw, fer2013, ferplus, mma, rafdb come from" in shown


def test_a_plug_in_s_tower_without_a_card_is_listed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKBONES, "mine", replace(BACKBONES["clip-vit-b32"], card=None))
    assert {"tower": "mine", "weights": "hub", "licence": None}.items() <= list_towers()[len(BACKBONES) - 1].items()
    assert CliRunner().invoke(main, ["tower", "list"]).exit_code == 0


def test_the_list_loads_no_library_of_towers() -> None:
    code = "import sys; from cafe.towers.catalogue import list_towers; list_towers(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "timm", "open_clip", "huggingface_hub"}.intersection(loaded)
