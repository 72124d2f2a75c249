"""Image branches: what they compute, and what they take from other people's checkpoints."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torchvision import models

from cafe.errors import UserError
from cafe.methods import METHODS
from cafe.methods.method import Inputs
from cafe.networks.branches import NETWORKS, Network, build_network, check_network
from cafe.towers.building import load_backbone

WAYS = ("torchvision", "pytorch")


def torchvision_model(name, num_classes=1000):
    torch.manual_seed(7)
    model = getattr(models, name)(num_classes=num_classes)
    for buffer in model.buffers():  # untrained statistics are all 0 and 1, which would hide a tensor left out
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
def test_a_branch_pools_to_what_the_classifier_of_torchvision_reads(name, tmp_path):
    model = torchvision_model(name)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    branch = build_network(name, f"file:{tmp_path / 'weights.pth'}").eval()
    read = []
    head = model.fc if hasattr(model, "fc") else model.classifier
    head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        model(images)
        features = branch(images)
    assert features.shape == (2, branch.width, 2, 2)
    assert torch.allclose(branch.pool(features), read[0], atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_of_a_branch_is_trained(name):
    branch = build_network(name)
    branch.pool(branch(torch.randn(2, 3, 32, 32))).square().sum().backward()
    assert all(parameter.grad is not None for parameter in branch.parameters())


def test_scratch_is_drawn_as_torchvision_does_or_by_the_default_of_a_layer():
    """ResNet-18's last convolution, 512 channels of 3 × 3: a normal of √(2 / 4608), or a uniform within 1 / √4608."""
    torch.manual_seed(0)
    normal, uniform = (build_network("resnet18", scratch=way).trunk.layer4[1].conv2.weight for way in WAYS)
    assert normal.std().item() == pytest.approx((2 / 4608) ** 0.5, rel=0.01)
    assert normal.abs().max() > 4 * normal.std()
    assert uniform.abs().max().item() == pytest.approx(4608**-0.5, rel=1e-3)
    assert uniform.std().item() == pytest.approx((1 / 3 / 4608) ** 0.5, rel=0.01)


@pytest.mark.parametrize(
    ("name", "way"),
    [("cafe", 1), ("cafe_map", 1), ("image_only", 1), ("rul", 1), ("scn", 0), ("eac", 0), ("ofer_own", 0)],
)
def test_each_method_draws_its_branch_as_its_released_script_does(name, way):
    torch.manual_seed(0)
    method = METHODS[name](METHODS[name].recipe_type(), Inputs(14, image_size=32))
    deviation = method.branch.trunk.layer4[1].conv2.weight.std().item()
    assert deviation == pytest.approx((((2, 1 / 3)[way]) / 4608) ** 0.5, rel=0.01)


def test_scn_draws_its_linear_layers_as_pytorch_does_and_uniformly_on_request_from_scratch(tmp_path):
    torch.save(torchvision_model("resnet18").state_dict(), tmp_path / "weights.pth")
    default, uniform = [512**-0.5] * 2, [7**-0.5, 1.0]  # by the inputs; by the outputs
    for init, head, limits in (
        ("scratch", "pytorch", default),
        ("scratch", "uniform", uniform),
        (f"file:{tmp_path / 'weights.pth'}", "uniform", default),
    ):
        drawn = METHODS["scn"](METHODS["scn"].recipe_type(head=head), Inputs(None, init=init)).head
        layers = (drawn.classifier, drawn.attention)
        assert [layer.weight.abs().max().item() for layer in layers] == pytest.approx(limits, rel=0.02)
        assert drawn.classifier.bias.any().item() == (limits is default)


def test_the_ms_celeb_layout_loads_without_its_classifier(tmp_path):
    model = torchvision_model("resnet18", num_classes=8)
    layout = {f"module.{key}": value for key, value in model.state_dict().items() if "num_batches_tracked" not in key}
    torch.save({"iter": 5, "state_dict": layout}, tmp_path / "msceleb.pth")
    branch = build_network("resnet18", f"file:{tmp_path / 'msceleb.pth'}")
    for name, value in branch.trunk.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_safetensors_and_pickled_weights_start_the_same_branch(tmp_path):
    state = torchvision_model("resnet18").state_dict()
    torch.save(state, tmp_path / "weights.pth")
    save_file(state, tmp_path / "weights.safetensors")
    one, other = (
        build_network("resnet18", f"file:{tmp_path / name}") for name in ("weights.pth", "weights.safetensors")
    )
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())


def test_a_tensor_of_another_shape_counts_as_missing(tmp_path):
    state = torchvision_model("resnet18").state_dict()
    state["conv1.weight"] = torch.zeros(64, 3, 3, 3)
    torch.save(state, tmp_path / "weights.pth")
    trunk = build_network("resnet18", f"file:{tmp_path / 'weights.pth'}").trunk
    assert trunk.conv1.weight.shape == (64, 3, 7, 7)
    assert torch.equal(trunk.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])


def test_a_branch_with_weights_that_are_installed_gives_the_map_of_that_tower():
    tower = load_backbone("imagenet-lite0").tower
    pictures = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    branch = build_network("efficientnet_lite0", "imagenet").eval()
    assert torch.equal(branch(pictures), tower.forward_features(pictures))
    assert branch.map_size(64) == (2, 2)
    assert all(weight.requires_grad for weight in branch.parameters())
    assert not torch.equal(build_network("efficientnet_lite0").eval()(pictures), branch(pictures))


@pytest.mark.parametrize(("left", "fits"), [(90, True), (89, False)])
def test_ninety_percent_of_the_tensors_must_load(left, fits, tmp_path):
    state = torchvision_model("resnet18").state_dict()
    counted = [key for key in state if not key.startswith("fc.") and not key.endswith("num_batches_tracked")]
    torch.save({key: state[key] for key in counted[100 - left :]}, tmp_path / "weights.pth")
    if fits:
        trunk = build_network("resnet18", f"file:{tmp_path / 'weights.pth'}").trunk
        assert torch.equal(trunk.layer4[1].bn2.running_var, state["layer4.1.bn2.running_var"])
    else:
        with pytest.raises(UserError, match=r"Only 89 of the 100 tensors of 'resnet18' load .*'conv1.weight'"):
            build_network("resnet18", f"file:{tmp_path / 'weights.pth'}")


def test_a_branch_without_weights_of_imagenet_is_refused_before_it_is_built(monkeypatch):
    monkeypatch.setitem(NETWORKS, "own", Network(torch.nn.Identity, 3, ()))
    with pytest.raises(UserError, match="Unknown initialisation 'imagenet': choose file:PATH, scratch"):
        check_network("own", "imagenet")


@pytest.mark.parametrize(
    ("name", "init", "message"),
    [
        ("resnet19", "scratch", "Unknown image branch 'resnet19': choose efficientnet_lite0, mobilenet_v2, res"),
        ("resnet18", "msceleb", "Unknown initialisation 'msceleb': choose file:PATH, imagenet, scratch."),
        ("resnet18", "file:/nowhere.pth", "No weights file at '/nowhere.pth'"),
    ],
)
def test_a_wrong_name_is_answered_in_one_sentence(name, init, message):
    with pytest.raises(UserError) as caught:
        build_network(name, init)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_unreachable_imagenet_weights_name_the_way_out():
    try:
        build_network("resnet18", "imagenet")
    except UserError as error:
        sentence = str(error)
    else:
        pytest.skip("the weights can be fetched here, so the sentence cannot be seen")
    assert sentence.startswith("Cannot fetch the imagenet weights of 'resnet18' (")
    assert "'file:PATH'" in sentence
