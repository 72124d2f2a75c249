"""What the tests share: tiny real images, a tiny real tower, and one Ray of two nodes for the whole session."""

from __future__ import annotations

import gc
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # read when torch is imported; threads that spin take the cores from others
os.environ["LOKY_MAX_CPU_COUNT"] = "1"  # cores, as joblib counts them: threads that wait for each other cost a sixth

from cafe.jobs.terminal import defer_gc, resume_gc

defer_gc()  # until all tests are imported: what torch and MLflow make stays to the end

import numpy as np
import pytest
import torch
from _pytest.nodeid import NodeId
from click.testing import CliRunner, Result
from PIL import Image
from torch import nn
from upath import UPath

from cafe import files
from cafe.errors import UserError
from cafe.networks.branches import NETWORKS, Network

os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # a process less per training
# Ray's tests are the longest chain: they must not wait for all others.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  its own spelling
OTHERS = 5  # niceness of the processes that run other tests: on a busy core a third of the time of those of that chain
os.environ.pop("COLUMNS", None)  # which processes of xdist have, too: commands print as wide as into a pipe
files.PAUSES = (0.01, 0.02, 0.04)  # as many tries as users get, without their waits

SHARED = Path(__file__).parents[2] / "shared"
GROUPED = ("ray_address", "real_ferplus", "installed")  # fixtures that take seconds, made in one process alone
COLOURS = {"happiness": (220, 180, 40), "sadness": (40, 60, 160), "anger": (200, 40, 40)}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outage", type=float, default=2.0, help="seconds that the object store of a test is away")
    parser.addoption("--golden", default=str(SHARED / "golden"), help="folder of reference numbers (.npz)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep in one process of xdist what shares what takes long to make: each process would else make its own.

    That is the session's Ray and what else `GROUPED` names, and in each file what is made once for all its tests. A group
    is the end of a test's id, which pytest 9.2 no longer lets pytest-xdist 3.8 write itself (its issue 1386). The longest
    comes first.
    """
    if not hasattr(config, "workerinput"):
        return
    groups = dict[pytest.Item, str]()
    for item in items:
        assert isinstance(item, pytest.Function)
        made = item._fixtureinfo.name2fixturedefs
        shared = [name for name in GROUPED if name in made]
        if shared or any(found[-1].scope == "module" for found in made.values()):
            groups[item] = shared[0] if shared else item.path.stem
            item._id = NodeId.parse(f"{item.nodeid}@{groups[item]}")
    items.sort(key=lambda item: (groups.get(item) != "ray_address", item not in groups))


def pytest_collection_finish() -> None:
    resume_gc()


def pytest_runtest_setup(item: pytest.Item) -> None:
    torch.set_num_threads(1)  # which commands change, that a test before ran in this process
    if hasattr(item.config, "workerinput") and not item.nodeid.endswith("@ray_address") and not os.nice(0):
        os.nice(OTHERS)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else extension modules complain of what they see never freed


@pytest.fixture(scope="session")
def real_faces() -> Path:
    """Real face photographs, which this project does not ship."""
    folder = SHARED / "faces"
    if not folder.is_dir():
        pytest.skip("needs the real faces in ../shared/faces, which are not there")
    return folder


@pytest.fixture(scope="session")
def real_ferplus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FERPlus as its repository distributes it, which this project does not ship."""
    if not (SHARED / "ferplus.tar.xz").is_file():
        pytest.skip("needs the real FERPlus in ../shared/ferplus.tar.xz, which is not there")
    folder = tmp_path_factory.mktemp("ferplus")
    # 35,000 pictures: Python's own tarfile takes four times as long.
    subprocess.run(["tar", "-xf", str(SHARED / "ferplus.tar.xz"), "-C", str(folder)], check=True)
    return folder


def draw_faces(root: Path, per_class: int = 12, size: int = 24, seed: int = 0, tint: int = 0) -> Path:
    """Write a folder of small noisy pictures whose colour tells the expression, as real PNG and JPEG files."""
    random = np.random.default_rng(seed)
    for expression, colour in COLOURS.items():
        (root / expression).mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            pixels = np.clip(random.normal(np.add(colour, tint), 40, (size, size, 3)), 0, 255).astype(np.uint8)
            suffix = "png" if number % 2 else "jpg"
            Image.fromarray(pixels).save(root / expression / f"{number:03d}.{suffix}")
    return root


@pytest.fixture(scope="session")
def tiny_tower(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of a two-layer ViT of open_clip with random weights saved to a file, 32 px, 24 channels."""
    import open_clip

    folder = tmp_path_factory.mktemp("tower")
    config = {
        "embed_dim": 24,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
    }
    (folder / "tiny-cafe-vit.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-cafe-vit.json")
    torch.manual_seed(0)
    torch.save(open_clip.create_model("tiny-cafe-vit").state_dict(), folder / "tiny.pt")
    return f"open_clip:{folder / 'tiny-cafe-vit.json'}@{folder / 'tiny.pt'}"


def build_small() -> nn.Module:
    """Two convolutions with batch norms, instead of ResNet-18's twenty: (N, 3, 12, 12) → (N, 512, 3, 3)."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 8, 3, 2, 1, bias=False),
            bn1=nn.BatchNorm2d(8),
            relu=nn.ReLU(),
            conv2=nn.Conv2d(8, 512, 3, 2, 1, bias=False),
            bn2=nn.BatchNorm2d(512),
            relu2=nn.ReLU(),
        )
    )


@pytest.fixture
def small_network(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an image branch of two convolutions, with as many channels as ResNet-18."""
    layers = ("conv1", "bn1", "relu", "conv2", "bn2", "relu2")
    monkeypatch.setitem(NETWORKS, "small", Network(build_small, 512, layers))
    return "small"


def start_node(log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start a Ray node of one core as a process group of its own, which writes to `log`."""
    command = [str(Path(sys.executable).with_name("ray")), "start", *arguments]
    command += ["--num-cpus=1", "--object-store-memory=200000000", "--block"]
    command += ["--no-monitor", "--include-log-monitor=false"]  # no autoscaler, and nobody reads workers' logs here
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
    with log.open("wb") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)


@pytest.fixture(scope="session")
def ray_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Ray cluster of a head and a second node, one core each, as processes of their own."""
    import ray

    folder = tmp_path_factory.mktemp("ray")
    deadline = time.monotonic() + 300
    head = ("--head", "--port=0", "--include-dashboard=false")
    nodes = [start_node(folder / "head.log", *head)]
    try:
        while not (found := re.search(r"--address='([^']+)'", (folder / "head.log").read_text())):
            assert time.monotonic() < deadline, (folder / "head.log").read_text()
            if nodes[0].poll() is not None:  # a crowded machine can be too slow for its own first node, too
                nodes[0] = start_node(folder / "head.log", *head)
            time.sleep(0.1)
        address = found[1]
        nodes.append(start_node(folder / "node.log", f"--address={address}"))
        ray.init(address, logging_level="ERROR", log_to_driver=False)  # and stays connected, see `Cafe.join`
        while ray.cluster_resources().get("CPU", 0) < 2:
            assert time.monotonic() < deadline, (folder / "node.log").read_text()
            if nodes[-1].poll() is not None:  # a crowded machine can be too slow for a node's first handshake
                nodes[-1] = start_node(folder / "node.log", f"--address={address}")
            time.sleep(0.2)
        yield address
    finally:
        ray.shutdown()
        for node in reversed(nodes):
            with suppress(ProcessLookupError):  # it ended by itself
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()


def complaint(function: Callable[..., object], *arguments: object) -> str:
    """Call a function and return the sentence of the `UserError` it raises, or nothing; anything else is a bug."""
    try:
        function(*arguments)
    except UserError as error:
        return str(error)
    return ""


class Cafe:
    """Runs `cafe` commands in a workspace, in this process."""

    def __init__(self, workspace: Path | UPath, address: str) -> None:
        self.workspace, self.address = workspace, address

    def __call__(self, *arguments: str, ray: bool = False) -> Result:
        from cafe.jobs.cli import main

        cluster = ["--address", self.address] if ray else []
        if ray:
            self.join()
        return CliRunner().invoke(main, ["--workspace", str(self.workspace), *arguments, *cluster])

    def join(self) -> None:
        """Stay connected to the session's cluster, which commands then share; each would need seconds to join anew."""
        import ray

        if not ray.is_initialized():
            ray.init(self.address, logging_level="ERROR", log_to_driver=False)

    def succeed(self, *arguments: str, ray: bool = False) -> str:
        result = self(*arguments, ray=ray)
        assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
        return result.output

    def fail(self, *arguments: str, code: int = 2) -> str:
        """Run a command that must fail with one sentence, and before Ray starts."""
        import ray

        ray.shutdown()
        result = self(*arguments)
        assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
        assert not ray.is_initialized()
        return result.output.strip()


@pytest.fixture
def cafe(tmp_path: Path, ray_address: str) -> Cafe:
    """The command line in a fresh workspace; with `ray=True` a command joins the session's cluster."""
    return Cafe(tmp_path / "work", ray_address)
