"""What needs no image branch: class means, text prompts, and the tower itself, each against a second route."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from conftest import draw_faces
from scipy.special import softmax
from torch import nn
from torch.nn import functional
from upath import UPath

from cafe.data.expressions import EXPRESSIONS
from cafe.data.indexing import index_files
from cafe.data.readers import DATASETS
from cafe.errors import UserError
from cafe.learning.loading import FaceDataset
from cafe.learning.training import fit, predict
from cafe.methods import METHODS
from cafe.methods.baselines import finetune, nearest_mean, zero_shot
from cafe.methods.baselines.finetune import Finetune, find_blocks, find_trained
from cafe.methods.baselines.nearest_mean import NearestClassMean
from cafe.methods.baselines.zero_shot import ZeroShot, parse_wordings, write_prompts
from cafe.methods.method import Inputs, apply_overrides
from cafe.towers.building import load_backbone
from cafe.towers.embedding import Embedder
from cafe.towers.text import embed_texts
from cafe.views.drawing import ViewPlan

CPU = torch.device("cpu")
PLAN = ViewPlan("paper", 0, 2, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_tower: str) -> FaceDataset:
    folder = draw_faces(tmp_path_factory.mktemp("faces"), per_class=50)
    manifest = index_files("tiny", DATASETS["folder"](UPath(folder))).manifest
    features = Embedder(load_backbone(tiny_tower), manifest, PLAN, "cpu", maps=False, dtype="float32")
    return FaceDataset(manifest, PLAN, frozenset({"features"}), 32, features)


# --- nearest class mean ----------------------------------------------------------------------------------------------


def test_the_nearest_mean_is_that_of_numpy_and_absent_classes_are_never_predicted(dataset: FaceDataset) -> None:
    manifest = dataset.manifest
    train, test = manifest.rows("train"), manifest.rows("test")
    method = NearestClassMean(nearest_mean.Recipe(), Inputs(24))
    fit(method, dataset, train, CPU)
    probabilities = predict(method, dataset, test, CPU)

    clean = dataset.features.read(manifest.rows("all"), 0)["pooled"]
    clean /= np.linalg.norm(clean, axis=1, keepdims=True)
    present = np.unique(manifest.labels[train])
    means = np.stack([clean[train][manifest.labels[train] == label].mean(axis=0) for label in present])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    distances = np.linalg.norm(clean[test][:, None] - means, axis=2)
    np.testing.assert_array_equal(probabilities.argmax(axis=1), present[distances.argmin(axis=1)])
    expected = softmax(100 * (1 - distances.astype(np.float64) ** 2 / 2), axis=1)  # the cosine of unit vectors
    np.testing.assert_allclose(probabilities[:, present], expected, atol=1e-3)
    absent = np.setdiff1d(np.arange(7), present)
    assert len(absent) == 4
    assert (probabilities[:, absent] == 0).all()
    assert (probabilities.argmax(axis=1) == manifest.labels[test]).mean() > 0.6


# --- zero-shot -------------------------------------------------------------------------------------------------------


def test_zero_shot_is_what_open_clip_says_when_asked_directly(dataset: FaceDataset, tiny_tower: str) -> None:
    method = ZeroShot(zero_shot.Recipe(), Inputs(24, backbone=tiny_tower))
    fit(method, dataset, dataset.manifest.rows("train"), CPU)
    rows = dataset.manifest.rows("test")
    ours = predict(method, dataset, rows, CPU)

    config, _, file = tiny_tower.partition("@")
    open_clip.add_model_config(config.removeprefix("open_clip:"))
    model = open_clip.create_model(Path(config).stem, load_weights=False).eval()
    model.load_state_dict(torch.load(file, weights_only=True))
    tokenizer = open_clip.get_tokenizer(Path(config).stem)
    (batch,) = FaceDataset(dataset.manifest, PLAN, frozenset({"image"}), 32).load([rows], 0, CPU)
    with torch.no_grad():
        images = model.encode_image(batch["image"], normalize=True)
        classes = []
        for expression in EXPRESSIONS:
            prompts = [template.format(zero_shot.WORDS[expression]) for template in zero_shot.TEMPLATES]
            mean = model.encode_text(tokenizer(prompts), normalize=True).mean(dim=0)
            classes.append(mean / mean.norm())
        expected = (model.logit_scale.exp() * images @ torch.stack(classes).T).softmax(dim=1).numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    assert expected.std(axis=1).min() > 1e-3  # not all the same


def test_the_prompts_name_every_expression_in_order() -> None:
    prompts = write_prompts(EXPRESSIONS, {})
    assert len(set(prompts)) == 7 * len(zero_shot.TEMPLATES)
    assert prompts[0] == "a photo of a surprised face."
    assert "neutral" in prompts[-1]


def test_classes_without_a_wording_are_called_by_their_name_unless_one_is_given() -> None:
    classes = ("contempt", "happily_surprised", "pain", "anger")
    prompts = write_prompts(classes, parse_wordings("pain:in pain, anger: cross"))[:: len(zero_shot.TEMPLATES)]
    assert prompts == [
        f"a photo of a {word} face." for word in ("contemptuous", "happily surprised", "in pain", "cross")
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pain", "Cannot read 'pain' of the setting wordings of zero_shot: write CLASS:WORDING once"),
        ("pain:in pain,fear:", "Cannot read 'fear:' of the setting wordings"),
        ("pain:in pain,pain:hurt", "Cannot read 'pain:hurt'"),
        ("rage:furious", "Unknown class in the wordings of zero_shot 'rage': choose drowsy, pain"),
    ],
)
def test_wordings_that_cannot_be_used_are_one_sentence(text: str, message: str) -> None:
    def build() -> ZeroShot:
        recipe = apply_overrides(zero_shot.Recipe(), [f"wordings={text}"], "zero_shot")
        return ZeroShot(recipe, Inputs(24, classes=("pain", "drowsy")))

    with pytest.raises(UserError, match=message):
        build()


@pytest.mark.parametrize("name", ["imagenet-lite0", "timm:resnet18"])
def test_a_tower_without_texts_is_one_sentence_before_anything_starts(name: str) -> None:
    with pytest.raises(UserError, match=f"The backbone '{name}' has no text tower, which zero-shot recognition needs"):
        ZeroShot.check(Inputs(1280, backbone=name))


def test_a_file_without_a_text_tower_is_one_sentence(tiny_tower: str, tmp_path: Path) -> None:
    config, _, file = tiny_tower.partition("@")
    tensors = torch.load(file, weights_only=True)
    torch.save({name: value for name, value in tensors.items() if name.startswith("visual.")}, tmp_path / "visual.pt")
    method = ZeroShot(zero_shot.Recipe(), Inputs(24, backbone=f"{config}@{tmp_path / 'visual.pt'}"))
    with pytest.raises(UserError, match=r"The weights do not fit the backbone .* tensors missing"):
        method.fit([])


def test_a_text_tower_with_another_vocabulary_is_one_sentence(tiny_tower: str, tmp_path: Path) -> None:
    config = json.loads(Path(tiny_tower.partition("@")[0].removeprefix("open_clip:")).read_text())
    config["text_cfg"]["vocab_size"] = 50
    (tmp_path / "few-words.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "few-words.json")
    torch.save(open_clip.create_model("few-words", load_weights=False).state_dict(), tmp_path / "few.pt")
    with pytest.raises(UserError, match="knows fewer words than open_clip's vocabulary for it: correct vocab_size"):
        embed_texts(f"open_clip:{tmp_path / 'few-words.json'}@{tmp_path / 'few.pt'}", ["a photo of a happy face."])


@pytest.mark.parametrize("name", ["zero_shot", "nearest_class_mean"])
def test_a_method_without_training_takes_no_epochs(name: str) -> None:
    recipe = METHODS[name].recipe_type()
    assert apply_overrides(recipe, [], name).epochs == 0
    with pytest.raises(
        UserError, match=f"{name} is not trained in epochs, so it cannot take 5 of them: leave them out."
    ):
        apply_overrides(recipe, ["epochs=5"], name)


# --- fine-tuning -----------------------------------------------------------------------------------------------------


def trained_names(tower: nn.Module, blocks: int) -> set[str]:
    learning = {id(parameter) for parameter in find_trained(tower, blocks)}
    return {name.removeprefix("tower.") for name, value in tower.named_parameters() if id(value) in learning}


def test_the_last_block_learns_with_all_that_follows_it(tiny_tower: str) -> None:
    tower = load_backbone(tiny_tower)
    names = {name for name, _ in tower.tower.named_parameters()}
    last = {name for name in names if name.startswith(("transformer.resblocks.1.", "ln_post."))} | {"proj"}
    assert trained_names(tower, 1) == last
    assert trained_names(tower, 2) == last | {name for name in names if name.startswith("transformer.resblocks.0.")}
    assert trained_names(tower, 0) == names
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    with pytest.raises(UserError, match="has 2 known blocks, fewer than 3: set fewer, or 0 for all"):
        find_trained(tower, 3)


@pytest.mark.parametrize(("name", "blocks", "first"), [("test_resnet", 4, "layer4."), ("test_vit", 6, "blocks.5.")])
def test_the_blocks_of_towers_of_timm_are_known(name: str, blocks: int, first: str, tmp_path: Path) -> None:
    import timm

    torch.save(timm.create_model(name).state_dict(), tmp_path / "weights.pth")
    tower = load_backbone(f"timm:{name}@{tmp_path / 'weights.pth'}", input_size=32)
    assert len(find_blocks(tower)) == blocks
    learning = trained_names(tower, 1)
    assert any(parameter.startswith(first) for parameter in learning)
    assert all(parameter.startswith((first, "norm.", "fc_norm.")) for parameter in learning)


def test_only_the_chosen_blocks_and_the_classifier_change(tiny_tower: str) -> None:
    torch.manual_seed(0)
    method = Finetune(finetune.Recipe(blocks=1), Inputs(24, image_size=32, backbone=tiny_tower))
    before = {name: value.clone() for name, value in method.state_dict().items()}
    optimizer = method.train().optimizer()
    assert [group["lr"] for group in optimizer.param_groups] == [1e-5, 2e-4]
    output = method({"image": torch.randn(4, 3, 32, 32)})
    functional.cross_entropy(output["logits"], torch.arange(4)).backward()
    optimizer.step()
    changed = {name for name, value in method.state_dict().items() if not torch.equal(value, before[name])}
    expected = {f"tower.tower.{name}" for name in trained_names(load_backbone(tiny_tower), 1)}
    assert changed <= expected | {"classifier.weight", "classifier.bias"}
    assert {"tower.tower.proj", "classifier.weight"} <= changed


def test_fine_tuning_starts_from_the_frozen_features(dataset: FaceDataset, tiny_tower: str) -> None:
    method = Finetune(finetune.Recipe(), Inputs(24, image_size=32, backbone=tiny_tower))
    rows = dataset.manifest.rows("test")[:5]
    (batch,) = FaceDataset(dataset.manifest, PLAN, method.needs, 32).load([rows], 1, CPU)
    with torch.no_grad():
        expected = method.classifier(torch.from_numpy(dataset.features.read(rows, 1)["pooled"]))
        torch.testing.assert_close(method(batch)["logits"], expected, rtol=1e-4, atol=1e-5)
