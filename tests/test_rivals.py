"""The rivals' parts, by hand and by a second route."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from upath import UPath

from cafe.learning.checkpoints import load_checkpoint, save_checkpoint
from cafe.learning.loading import own_part
from cafe.methods import eac, rul, scn
from cafe.methods.eac import attend, eac_losses
from cafe.methods.method import Inputs
from cafe.methods.rul import Rul, add_up_loss, measure_uncertainty, mix
from cafe.methods.scn import Scn, find_low_group, relabel, scn_losses
from cafe.networks.parallel import GlobalDropout, gather, rank, share_batch_norm, world_size
from cafe.towers.weights import read_tensors, write_tensors

WEIGHTS = torch.tensor([[0.9], [0.2], [0.6], [0.4], [0.8]])
ROWS, LABELS = torch.tensor([40, 7, 12, 3]), torch.tensor([1, 1, 2, 0])


def certain(classes: list[int], margin: float = 9.0) -> torch.Tensor:
    """Logits (n, 7) that favour one class each."""
    return margin * functional.one_hot(torch.tensor(classes), 7).float()


# --- SCN -------------------------------------------------------------------------------------------------------------


def test_the_high_group_is_the_share_rounded_down_and_neither_group_is_empty() -> None:
    assert find_low_group(WEIGHTS, 0.7).tolist() == [False, True, False, True, False]  # 3 of 5 are high
    assert find_low_group(WEIGHTS, 0.1).sum() == 4
    assert find_low_group(WEIGHTS, 1.0).tolist() == [False, True, False, False, False]


@pytest.mark.parametrize(("margin", "expected"), [(0.6, 0.6 - (2.3 / 3 - 0.3)), (0.4, 0.0)])
def test_the_rank_regularisation_of_a_worked_example(margin: float, expected: float) -> None:
    """The means of the groups are (.9 + .8 + .6) / 3 and (.4 + .2) / 2; equal logits cost ln 7."""
    recipe = scn.Recipe(margin=margin, rank=2.0)
    losses = scn_losses(torch.zeros(5, 7), WEIGHTS, torch.zeros(5, dtype=torch.int64), recipe)
    assert losses["rank"].item() == pytest.approx(expected, abs=1e-6)
    assert losses["total"].item() == pytest.approx(1.9459101 + 2 * expected, abs=1e-6)


def test_a_label_is_replaced_only_where_another_class_leads_by_more_than_the_margin() -> None:
    probabilities = torch.tensor([[0.45, 0.35, 0.2], [0.6, 0.3, 0.1], [0.1, 0.3, 0.6]])
    assert relabel(probabilities.log(), torch.tensor([1, 1, 2]), 0.2).tolist() == [1, 0, 2]


def new_scn(**recipe: object) -> Scn:
    torch.manual_seed(0)
    return Scn(scn.Recipe(**recipe), Inputs(None, image_size=16))


def whole_batch(epoch: int) -> dict[str, object]:
    return {"row": ROWS, "label": LABELS, "epoch": epoch}


def test_relabelling_starts_in_its_epoch_and_builds_on_the_labels_as_they_are() -> None:
    method, weight = new_scn(relabel_after=2), torch.rand(4, 1)
    method.after_step({"logits": certain([5, 1, 5, 0]), "weight": weight}, whole_batch(2))
    assert method.labels(ROWS, LABELS).tolist() == [1, 1, 2, 0]
    method.after_step({"logits": certain([5, 1, 5, 0]), "weight": weight}, whole_batch(3))
    assert method.labels(ROWS, LABELS).tolist() == [5, 1, 5, 0]
    method.after_step({"logits": certain([5, 4, 2, 0]), "weight": weight}, whole_batch(4))
    assert method.labels(ROWS, LABELS).tolist() == [5, 4, 2, 0]
    assert method.labels.replaced == {40: 5, 7: 4, 12: 2}


@pytest.mark.parametrize(("whom", "expected"), [("all", [5, 5, 5, 5]), ("low", [1, 5, 2, 5]), ("none", [1, 1, 2, 0])])
def test_all_faces_or_those_of_the_low_group_or_none_are_relabelled(whom: str, expected: list[int]) -> None:
    method = new_scn(relabel=whom, relabel_after=0, high_share=0.5)
    method.after_step(
        {"logits": certain([5] * 4), "weight": torch.tensor([[0.9], [0.1], [0.8], [0.2]])}, whole_batch(1)
    )
    assert method.labels(ROWS, LABELS).tolist() == expected


def test_the_losses_use_the_replaced_labels_and_report_their_share() -> None:
    method = new_scn()
    method.labels.replace(ROWS[:1], torch.tensor([5]))
    output = {"logits": certain([5, 1, 2, 0]), "weight": torch.tensor([[1.0], [0.0], [1.0], [0.0]])}
    losses = method.losses(output, whole_batch(11))
    assert losses["classification"] == pytest.approx(6 * np.exp(-9), rel=1e-2)
    assert losses["relabelled"] == 0.25


def test_replaced_labels_survive_checkpoints_and_a_model_file(tmp_path: Path) -> None:
    method = new_scn()
    untouched = method.state_dict()["labels._extra_state"]
    assert untouched.shape == (0, 2)
    method.labels.replace(torch.tensor([9, 4, 9]), torch.tensor([1, 3, 6]))
    save_checkpoint(UPath(tmp_path), method, method.optimizer(), {"epoch": 12})
    write_tensors(UPath(tmp_path / "model.safetensors"), method.state_dict())
    resumed, loaded = new_scn(), new_scn()
    load_checkpoint(UPath(tmp_path), resumed, resumed.optimizer())
    loaded.load_state_dict(read_tensors(UPath(tmp_path / "model.safetensors")))
    for other in (resumed, loaded):
        assert other.labels(torch.tensor([9, 4, 5]), torch.tensor([0, 0, 0])).tolist() == [6, 3, 0]
    loaded.labels.load_state_dict({"_extra_state": untouched})
    assert loaded.labels.replaced == {}


# --- RUL -------------------------------------------------------------------------------------------------------------


def test_mixing_logits_is_classifying_the_mixed_features() -> None:
    """The published route, in double precision: mix mean vectors, classify, ask for both labels."""
    generator = torch.Generator().manual_seed(3)
    mean, log_variance = torch.randn(2, 6, 16, generator=generator).double()
    classifier = torch.nn.Linear(16, 7).double()
    labels, partner = torch.tensor([0, 6, 2, 2, 5, 1]), torch.tensor([3, 1, 0, 5, 2, 4])
    variance = log_variance.exp().mean(1, keepdim=True)
    share = variance / (variance + variance[partner])
    mixed = classifier(share * mean + variance[partner] / (variance + variance[partner]) * mean[partner])
    published = 0.5 * functional.cross_entropy(mixed, labels) + 0.5 * functional.cross_entropy(mixed, labels[partner])
    ours = add_up_loss(mix(classifier(mean), measure_uncertainty(log_variance), partner), labels, partner)
    assert ours.item() == pytest.approx(published.item(), abs=1e-12)
    assert mix(mean, variance, partner)[1].tolist() == pytest.approx(mean[1].tolist())  # mixed with itself


def test_the_more_uncertain_face_has_the_larger_share() -> None:
    values = mix(torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [1.0]]), torch.tensor([1, 0]))
    assert values.flatten().tolist() == pytest.approx([0.25, 0.25])


@pytest.mark.parametrize(
    ("network", "size", "places"), [("resnet18", 48, 4), ("resnet18", 33, 4), ("mobilenet_v2", 64, 4)]
)
def test_the_heads_are_as_wide_as_the_map(network: str, size: int, places: int) -> None:
    method = Rul(rul.Recipe(), Inputs(None, network, image_size=size))
    assert method.mean[3].in_features == method.branch.width * places
    assert method.eval()({"image": torch.zeros(1, 3, size, size)})["logits"].shape == (1, 7)


def test_the_classifier_alone_learns_ten_times_as_fast() -> None:
    method = Rul(rul.Recipe(), Inputs(None, image_size=16))
    slow, fast = method.optimizer().param_groups
    assert (slow["lr"], fast["lr"]) == (2e-4, 2e-3)
    assert [id(parameter) for parameter in fast["params"]] == [id(value) for value in method.classifier.parameters()]
    assert len(slow["params"]) + 2 == len(list(method.parameters()))


def test_a_dropout_over_workers_keeps_the_mean_and_the_share() -> None:
    torch.manual_seed(0)
    layer, values = GlobalDropout(0.4), torch.ones(100, 20, 5)
    dropped = layer(values)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert dropped.eq(0).float().mean().item() == pytest.approx(0.4, abs=4 * (0.24 / 1e4) ** 0.5)
    assert not torch.equal(dropped, layer(values))
    torch.manual_seed(0)
    assert torch.equal(dropped, layer(values))
    assert layer.eval()(values) is values


# --- EAC -------------------------------------------------------------------------------------------------------------


def test_an_attention_map_averages_to_its_logit_without_the_bias() -> None:
    features, weight = torch.randn(2, 5, 3, 3), torch.randn(7, 5, requires_grad=True)
    attention = attend(features, weight)
    torch.testing.assert_close(attention.mean((2, 3)), functional.linear(features.mean((2, 3)), weight).detach())
    assert not attention.requires_grad  # the classifier's weights are detached


def test_the_consistency_compares_a_map_with_the_mirrored_map_of_the_mirror_image() -> None:
    attention, labels = torch.randn(4, 7, 3, 5), torch.tensor([0, 1, 2, 3])
    losses = eac_losses(torch.zeros(4, 7), attention, attention.flip(3), labels, eac.Recipe())
    assert losses["consistency"] == 0
    shifted = eac_losses(torch.zeros(4, 7), attention, attention.flip(3) + 0.2, labels, eac.Recipe())
    assert shifted["consistency"].item() == pytest.approx(0.04, rel=1e-5)
    assert shifted["total"].item() == pytest.approx(1.9459101 + 5 * 0.04, abs=1e-5)
    # The released script mirrors by resampling on a grid of corners; that is this flip.
    corners = torch.stack(torch.meshgrid(torch.linspace(-1, 1, 3), torch.linspace(1, -1, 5), indexing="ij"), -1).flip(
        -1
    )
    resampled = functional.grid_sample(
        attention, corners.expand(4, -1, -1, -1), padding_mode="border", align_corners=True
    )
    torch.testing.assert_close(resampled, attention.flip(3), atol=1e-5, rtol=0)


# --- several workers -------------------------------------------------------------------------------------------------

TOTAL = 11  # odd: the workers' parts differ in size


def train_rul_and_relabel(store: str, number: int, workers: int, results: str) -> None:
    """One step of RUL, with dropout and mixing, and one relabelling of SCN by its logits; the last worker saves."""
    torch.set_num_threads(1)
    if workers > 1:
        distributed.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=workers)
    torch.manual_seed(0)
    method = Rul(rul.Recipe(), Inputs(None, image_size=8)).double()
    if workers > 1:
        share_batch_norm(method)
    module = DistributedDataParallel(method) if workers > 1 else method
    images = torch.randn(TOTAL, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    labels = torch.arange(TOTAL) % 7
    torch.manual_seed(2 + rank())
    output = module({"image": images[own_part(np.arange(TOTAL))]})
    whole = {name: gather(value.double(), TOTAL) for name, value in output.items()}
    batch = {"label": labels, "row": torch.arange(TOTAL), "epoch": 10, "generator": torch.Generator().manual_seed(3)}
    loss = method.losses({name: value.float() for name, value in whole.items()}, batch)["total"]
    (loss * world_size()).backward()
    cured = new_scn(relabel_margin=0.0)
    cured.after_step({"logits": whole["logits"].detach(), "weight": whole["logits"][:, :1].detach().sigmoid()}, batch)
    if rank() == workers - 1:
        gradients = {f"gradient of {name}": parameter.grad for name, parameter in method.named_parameters()}
        state = {"labels": cured.labels.get_extra_state(), "logits": whole["logits"].detach(), "loss": loss.detach()}
        torch.save({**gradients, **dict(method.named_buffers()), **state}, results)
    if workers > 1:
        distributed.destroy_process_group()


def start(number: int, store: str, results: str) -> None:
    train_rul_and_relabel(store, number, 2, results)


def test_two_workers_drop_mix_and_relabel_as_one(tmp_path: Path) -> None:
    train_rul_and_relabel("", 0, 1, str(tmp_path / "one.pt"))
    multiprocessing.spawn(start, (str(tmp_path / "store"), str(tmp_path / "two.pt")), nprocs=2)
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert len(one["labels"]) > TOTAL / 2
    assert max(value.abs().max() for name, value in one.items() if "gradient" in name) > 0.01
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-6, msg=name)
