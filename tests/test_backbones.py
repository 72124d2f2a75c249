"""Frozen towers: the library's own features, honest maps, a digest of the weights, one sentence per mistake."""

from __future__ import annotations

import json
import logging
import time
import warnings
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file

from cafe.errors import UserError
from cafe.towers.building import load_backbone
from cafe.towers.facts import NORMALISATIONS, resolve_normalisation
from cafe.towers.names import BACKBONES, parse_backbone
from cafe.towers.weights import read_state_dict

TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
TINY_VIT = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
CONFIGS = {
    "tiny_vit": TINY_VIT,
    "tiny_vit_mean": {**TINY_VIT, "pool_type": "avg"},
    "tiny_resnet": {"image_size": 64, "width": 8, "layers": [1, 1, 1, 1]},
    "tiny_timm": {"image_size": 160, "timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear"},
}
TIMM = ("test_resnet", "test_efficientnet", "test_vit", "test_mambaout")


def unsettle(model):
    """Give every tensor values of its own, so that one left out or swapped shows."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.is_floating_point():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.02)
    return model.eval()


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """Tiny open_clip models: name → (backbone name, the whole model as the library builds it)."""
    folder = tmp_path_factory.mktemp("towers")
    built = {}
    for name, vision in CONFIGS.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps({"embed_dim": 24, "quick_gelu": True, "vision_cfg": vision, "text_cfg": TEXT}))
        open_clip.add_model_config(path)
        model = unsettle(open_clip.create_model(name, load_weights=False))
        torch.save({"state_dict": model.state_dict()}, folder / f"{name}.pt")
        save_file(model.state_dict(), folder / f"{name}.safetensors")
        built[name] = (f"open_clip:{path}@{folder / name}.pt", model)
    return built


@pytest.fixture(scope="module")
def timm_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("timm")
    files = {}
    for name in TIMM:
        model = unsettle(timm.create_model(name))
        torch.save(model.state_dict(), folder / f"{name}.pth")
        files[name] = (f"timm:{name}@{folder / name}.pth", model)
    return files


@pytest.mark.parametrize("name", CONFIGS)
def test_open_clip_features_are_those_of_encode_image(name, towers):
    backbone_name, model = towers[name]
    backbone = load_backbone(backbone_name)
    images = torch.randn(2, 3, backbone.facts.input_size, backbone.facts.input_size)
    with torch.no_grad():
        expected = model.encode_image(images)
        pooled, nothing = backbone(images)
        again, features = backbone(images, with_map=True)
    assert torch.allclose(pooled, expected, atol=1e-6)
    assert torch.allclose(again, expected, atol=1e-6)
    assert nothing is None
    assert backbone.facts.width == 24
    assert features.shape[1:] == backbone.facts.map_shape


@pytest.mark.parametrize("name", TIMM)
def test_timm_features_are_those_of_the_model_without_classifier(name, timm_files):
    backbone_name, model = timm_files[name]
    direct = timm.create_model(name, num_classes=0).eval()
    direct.load_state_dict(model.state_dict(), strict=False)
    backbone = load_backbone(backbone_name)
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        expected = direct(images)
        assert torch.allclose(backbone(images)[0], expected, atol=1e-6)
        assert torch.allclose(backbone(images, with_map=True)[0], expected, atol=1e-6)
    assert backbone.facts.input_size == 160
    assert (backbone.facts.mean, backbone.facts.std) == (direct.pretrained_cfg["mean"], direct.pretrained_cfg["std"])


def test_the_map_of_a_vit_is_its_patch_tokens_by_hand(towers):
    backbone_name, model = towers["tiny_vit"]
    images = torch.randn(2, 3, 32, 32)
    visual = model.visual
    with torch.no_grad():
        patches = visual.conv1(images).flatten(2).transpose(1, 2)  # (2, 16, 32)
        tokens = torch.cat([visual.class_embedding.expand(2, 1, -1), patches], dim=1) + visual.positional_embedding
        tokens = visual.ln_post(visual.transformer(visual.ln_pre(tokens))) @ visual.proj
        _, features = load_backbone(backbone_name)(images, with_map=True)
    assert features.shape == (2, 24, 4, 4)
    for row in range(4):
        for column in range(4):
            assert torch.allclose(features[:, :, row, column], tokens[:, 1 + 4 * row + column], atol=1e-5)


def test_the_map_of_a_mean_pooled_vit_averages_to_its_features(towers):
    backbone = load_backbone(towers["tiny_vit_mean"][0])
    pooled, features = backbone(torch.randn(2, 3, 32, 32), with_map=True)
    assert torch.allclose(features.mean((2, 3)), pooled, atol=1e-5)


def test_the_map_of_an_open_clip_resnet_is_what_its_attention_pools(towers):
    backbone_name, model = towers["tiny_resnet"]
    pooled, features = load_backbone(backbone_name)(torch.randn(2, 3, 64, 64), with_map=True)
    assert features.shape == (2, 256, 2, 2)
    assert torch.allclose(model.visual.attnpool(features), pooled, atol=1e-6)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_the_map_of_an_averaging_network_averages_to_its_features(name, timm_files):
    pooled, features = load_backbone(timm_files[name][0])(torch.randn(2, 3, 160, 160), with_map=True)
    assert torch.allclose(features.mean((2, 3)), pooled, atol=1e-5)


def test_the_map_of_a_timm_vit_leaves_its_prefix_tokens_out(timm_files):
    backbone_name, model = timm_files["test_vit"]
    images = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        tokens = model.forward_features(images)  # (1, 1 + 100, C)
        _, features = load_backbone(backbone_name)(images, with_map=True)
    assert features.shape[2:] == (10, 10)
    assert torch.allclose(features[0, :, 3, 7], tokens[0, 1 + 37], atol=1e-5)


def test_the_map_of_a_channels_last_network_has_its_channels_first(timm_files):
    backbone_name, model = timm_files["test_mambaout"]
    images = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        expected = model.forward_features(images)  # (1, h, w, C)
        _, features = load_backbone(backbone_name)(images, with_map=True)
    assert torch.allclose(features[0, :, 1, 3], expected[0, 1, 3], atol=1e-5)


def test_a_tower_without_a_known_map_says_so(tmp_path):
    path = tmp_path / "coca.json"
    vision = {**TINY_VIT, "attentional_pool": True, "attn_pooler_heads": 2}
    path.write_text(json.dumps({"embed_dim": 24, "vision_cfg": vision, "text_cfg": TEXT}))
    open_clip.add_model_config(path)
    whole = open_clip.create_model("coca", load_weights=False).eval()
    torch.save(whole.state_dict(), tmp_path / "coca.pt")
    backbone = load_backbone(f"open_clip:{path}@{tmp_path / 'coca.pt'}")
    images = torch.randn(2, 3, 32, 32)
    # Weights are drawn anew every time; rounding up to 1.3e-6 was seen.
    assert torch.allclose(backbone(images)[0], whole.encode_image(images), atol=1e-5)
    assert backbone.facts.map_shape is None
    with pytest.raises(UserError, match="has no known feature map"):
        backbone(images, with_map=True)


def test_the_digest_names_the_weights_and_not_the_file(towers, tmp_path):
    backbone_name, model = towers["tiny_vit"]
    digest = load_backbone(backbone_name).facts.weights_digest
    assert len(digest) == 64
    assert load_backbone(backbone_name.replace(".pt", ".safetensors")).facts.weights_digest == digest
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state["logit_scale"] += 1  # not of the visual tower
    torch.save(state, tmp_path / "other_text.pt")
    config = backbone_name.partition("@")[0]
    assert load_backbone(f"{config}@{tmp_path / 'other_text.pt'}").facts.weights_digest == digest
    state["visual.ln_post.bias"][5] += 1e-4
    torch.save(state, tmp_path / "other_visual.pt")
    assert load_backbone(f"{config}@{tmp_path / 'other_visual.pt'}").facts.weights_digest != digest


def test_the_precision_changes_the_tower_but_not_the_digest_nor_the_output_type(towers):
    exact, rounded = load_backbone(towers["tiny_vit"][0]), load_backbone(towers["tiny_vit"][0], precision="bf16")
    images = torch.randn(4, 3, 32, 32)
    assert next(rounded.tower.parameters()).dtype == torch.bfloat16
    assert rounded.facts.weights_digest == exact.facts.weights_digest
    for expected, got in zip(exact(images, with_map=True), rounded(images, with_map=True), strict=True):
        assert got.dtype == torch.float32
        assert not torch.equal(expected, got)
        assert torch.nn.functional.cosine_similarity(expected.flatten(1), got.flatten(1)).min() > 0.999


def test_a_backbone_stays_frozen_inside_a_method_in_training(timm_files):
    backbone = load_backbone(timm_files["test_resnet"][0])
    torch.nn.Sequential(backbone).train()
    images = torch.randn(2, 3, 160, 160)
    assert torch.equal(backbone(images)[0], backbone(images)[0])
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize("size", [64, 16])
def test_another_input_size_gives_what_the_library_gives_at_that_size(size, towers):
    backbone_name, _ = towers["tiny_vit"]
    file = backbone_name.partition("@")[2]
    direct = open_clip.create_model("tiny_vit", pretrained=file, force_image_size=size, require_pretrained=True).eval()
    backbone = load_backbone(backbone_name, input_size=size)
    images = torch.randn(2, 3, size, size)
    assert torch.allclose(backbone(images)[0], direct.encode_image(images), atol=1e-6)
    assert (backbone.facts.input_size, backbone.facts.map_shape) == (size, (24, size // 8, size // 8))


def test_a_timm_tower_takes_another_input_size(timm_files):
    assert load_backbone(timm_files["test_vit"][0], input_size=64).facts.map_shape[1:] == (4, 4)
    assert load_backbone(timm_files["test_resnet"][0], input_size=64).facts.map_shape[1:] == (2, 2)
    with pytest.raises(UserError, match=r"cannot take input size 33 .*divisible"):
        load_backbone(timm_files["test_vit"][0], input_size=33)


# --- the tower that is always there ----------------------------------------------------------------------------------


def test_imagenet_lite0_sees_a_palace_and_a_daisy():
    from sklearn.datasets import load_sample_image
    from torchvision.transforms.functional import center_crop, normalize, resize

    backbone = load_backbone("imagenet-lite0")
    weights = torch.load(parse_backbone("imagenet-lite0").file, weights_only=True)
    mean, std = resolve_normalisation(backbone.facts)
    for photograph, label in (("china.jpg", 698), ("flower.jpg", 985)):
        image = torch.from_numpy(load_sample_image(photograph).copy()).permute(2, 0, 1) / 255
        image = normalize(center_crop(resize(image, [256], antialias=True), [224]), list(mean), list(std))
        pooled, features = backbone(image[None], with_map=True)
        assert torch.allclose(features.mean((2, 3)), pooled, atol=1e-5)
        assert (pooled @ weights["_fc.weight"].T + weights["_fc.bias"]).argmax().item() == label


def test_imagenet_lite0_has_every_packaged_tensor_in_its_place():
    backbone = load_backbone("imagenet-lite0")
    weights = torch.load(parse_backbone("imagenet-lite0").file, weights_only=True)
    own = backbone.tower.state_dict()
    assert len(own) == len(weights) - 2
    assert torch.equal(own["conv_stem.weight"], weights["_conv_stem.weight"])
    assert torch.equal(own["blocks.1.0.conv_pwl.weight"], weights["_blocks.1._project_conv.weight"])
    assert torch.equal(own["blocks.6.0.bn3.running_var"], weights["_blocks.15._bn2.running_var"])
    assert torch.equal(own["bn2.running_mean"], weights["_bn1.running_mean"])
    assert (backbone.facts.width, backbone.facts.map_shape, backbone.facts.input_size) == (1280, (1280, 7, 7), 224)


def test_normalisation_is_the_tower_s_own_unless_the_name_or_the_user_says_otherwise(towers):
    backbone = load_backbone(towers["tiny_vit"][0])
    assert resolve_normalisation(backbone.facts) == NORMALISATIONS["clip"]
    assert resolve_normalisation(backbone.facts, "imagenet") == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert BACKBONES["clip-vit-b32"].normalisation == "imagenet"  # as the released script feeds it
    with pytest.raises(UserError, match="Unknown normalisation 'none': choose clip, imagenet, tower"):
        resolve_normalisation(backbone.facts, "none")


def test_the_libraries_stay_quiet(towers, capfd):
    handlers = list(logging.getLogger().handlers)
    load_backbone(towers["tiny_resnet"][0])
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger().handlers == handlers
    assert logging.root.manager.disable == logging.NOTSET


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("clip", ["Unknown backbone 'clip'", "imagenet-lite0", "open_clip:MODEL/TAG", "timm:MODEL@FILE"]),
        ("open_clip:ViT-B-33/openai", ["Unknown open_clip model 'ViT-B-33'", "did you mean ViT-B-32"]),
        ("open_clip:ViT-B-32/openapi", ["'open_clip:ViT-B-32/openapi'", "laion2b_s34b_b79k", "@FILE"]),
        ("open_clip:ViT-B-32/openai", ["another activation", "'open_clip:ViT-B-32-quickgelu/openai'"]),
        ("open_clip:nowhere.json@x.pt", ["Cannot read the open_clip configuration 'nowhere.json'"]),
        ("timm:resnet19", ["Unknown timm model 'resnet19'", "did you mean resnet18"]),
        ("timm:resnet18.a9_in1k", ["'timm:resnet18.a9_in1k'", "a1_in1k", "'timm:resnet18@FILE'"]),
        (
            "timm:vit_huge_patch14_clip_224.metaclip2_worldwide",
            ["another activation", "clip_quickgelu_224.metaclip2_worldwide'"],
        ),
        (
            "timm:vit_base_patch32_clip_224.openai",
            ["another activation", "'timm:vit_base_patch32_clip_quickgelu_224.openai'"],
        ),
        ("timm:hf-hub:nobody", ["'timm:hf-hub:nobody'", "write timm:hf-hub:OWNER/NAME"]),
        ("timm:hf-hub:no body/none", ["'timm:hf-hub:no body/none'", "write timm:hf-hub:OWNER/NAME"]),
        ("timm:local-dir:/nowhere", ["The folder '/nowhere'", "has no config.json"]),
        ("farl-vit-b16", ["on no hub", "download FaRL-Base-Patch16-LAIONFace20M-ep64.pth", "'farl-vit-b16@FILE'"]),
        (
            "vggface2-b0",
            ["on no hub", "download models/pretrained_faces/state_vggface2_enet0_new.pt", "'vggface2-b0@FILE'"],
        ),
        ("timm:test_resnet@/nowhere.pth", ["No weights file at '/nowhere.pth'"]),
        ("clip-vit-b32@/nowhere.pt", ["No weights file at '/nowhere.pt'"]),
    ],
)
def test_a_wrong_name_is_answered_in_one_sentence(name, parts):
    with pytest.raises(UserError) as caught:
        parse_backbone(name)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_precision_is_answered_with_the_choices():
    with pytest.raises(UserError, match="Unknown precision 'int8': choose bf16, fp16, fp32"):
        load_backbone("imagenet-lite0", precision="int8")


def test_weights_of_another_model_are_refused_with_the_numbers(towers, timm_files, tmp_path):
    backbone_name, model = towers["tiny_vit"]
    narrower = {**model.state_dict(), "visual.proj": torch.zeros(32, 16)}
    save_file(narrower, tmp_path / "narrower.safetensors")
    with pytest.raises(UserError, match=r": 0 tensors missing, 0 unexpected, 1 of another shape, .* 'proj'"):
        load_backbone(f"{backbone_name.partition('@')[0]}@{tmp_path}/narrower.safetensors")
    with pytest.raises(UserError, match=r"do not fit .*[1-9]\d* tensors missing, [1-9]\d* unexpected"):
        load_backbone(f"timm:test_vit@{timm_files['test_resnet'][0].partition('@')[2]}")


class _NotATensor:
    pass


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 half an archive"])
def test_a_damaged_file_is_refused(suffix, content, tmp_path):
    (tmp_path / f"weights.{suffix}").write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as plain tensors"):
        load_backbone(f"timm:test_resnet@{tmp_path}/weights.{suffix}")


def test_a_truncated_file_is_refused(timm_files, tmp_path):
    whole = Path(timm_files["test_resnet"][0].partition("@")[2]).read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read as plain tensors"):
        load_backbone(f"timm:test_resnet@{tmp_path}/half.pth")


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.replace(b"PK\x01\x02", b"PK\x01\x03"),  # the table of what is in the archive
        lambda content: content.replace(b"PK\x06\x07\x00", b"PK\x06\x07\x01"),  # which lies on other disks, too
        lambda content: content.replace(b"\x80\x02}q\x00", b"\x80\x02gq\x00"),  # no such operation
        lambda content: content.replace(b"weight", b"\xff\xff\xff\xff\xff\xff"),  # no text
    ],
)
def test_a_damaged_archive_is_refused(damage, tmp_path):
    torch.save({"weight": torch.ones(1)}, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    assert damage(whole) != whole
    (tmp_path / "damaged.pt").write_bytes(damage(whole))
    with pytest.raises(UserError, match="cannot be read as plain tensors"):
        read_state_dict(tmp_path / "damaged.pt")


def test_nothing_in_a_weights_file_is_executed(tmp_path):
    torch.save({"state_dict": {"weight": torch.ones(1)}, "args": _NotATensor()}, tmp_path / "objects.pt")
    with pytest.raises(UserError, match="cannot be read as plain tensors"):
        load_backbone(f"timm:test_resnet@{tmp_path}/objects.pt")
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.ones(1)), tmp_path / "script.pt")
    with pytest.raises(UserError, match="is a TorchScript archive"):
        load_backbone(f"timm:test_resnet@{tmp_path}/script.pt")


@pytest.mark.parametrize("name", ["clip-vit-b32", "timm:test_resnet"])
def test_an_unreachable_hub_is_answered_at_once_with_the_way_out(name):
    start = time.monotonic()
    try:
        load_backbone(name)
    except UserError as error:
        sentence, seconds = str(error), time.monotonic() - start
    else:
        pytest.skip("the hub answers here, so the sentence cannot be seen")
    assert sentence.startswith(f"Cannot fetch the weights of '{name}' from their hub")
    assert "@FILE'" in sentence
    assert "'imagenet-lite0'" in sentence
    assert "\n" not in sentence
    assert seconds < 15  # the library alone retries for 46 seconds
