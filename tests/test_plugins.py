"""A method, tower, data set or image branch of a user's own, from a file or an installed package, without editing ours."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from conftest import complaint
from plugged import forgotten_plugins

from cafe.data.readers import DATASETS, find_reader
from cafe.methods import METHODS, find_method
from cafe.methods.baselines.linear_probe import LinearProbe
from cafe.networks.branches import NETWORKS, build_network, check_network
from cafe.plugins import Plugin, check_plugins, find_plugins, load_plugins
from cafe.towers.names import BACKBONES, BackboneSpec, absolute_name, parse_backbone

METHOD = """from cafe.methods import METHODS
from cafe.methods.baselines.linear_probe import LinearProbe


class Probe(LinearProbe):
    \"\"\"A probe of a user's.\"\"\"


METHODS["own_probe"] = Probe
"""
TOWER = """from cafe.towers.names import BACKBONES, BackboneSpec, Layer

tower = BackboneSpec("timm", "test_resnet", tag="r160_in1k", layer=Layer("stage3", "2x2"))
"""
READER = "from cafe.data.readers.folder import read_folder\n\n\ndef read_own(root):\n    return read_folder(root)\n"
NETWORK = """from cafe.networks.branches import from_torchvision

network = from_torchvision("mobilenet_v3_small", 576, ("features",))
"""
ADD = {
    "methods": "\nfrom cafe.methods import METHODS\n\nMETHODS['own_methods'] = Probe\n",
    "towers": "\nBACKBONES['own_towers'] = tower\n",
    "datasets": "\nfrom cafe.data.readers import DATASETS\n\nDATASETS['own_datasets'] = read_own\n",
    "networks": "\nfrom cafe.networks.branches import NETWORKS\n\nNETWORKS['own_networks'] = network\n",
}
SOURCES = {
    "methods": METHOD.partition("\n\n\nMETHODS[")[0] + "\n",
    "towers": TOWER,
    "datasets": READER,
    "networks": NETWORK,
}
OBJECTS = {"methods": "Probe", "towers": "tower", "datasets": "read_own", "networks": "network"}


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    with forgotten_plugins():
        yield


def write(folder: Path, source: str, name: str = "mine.py") -> str:
    (folder / name).write_text(source)
    return str(folder / name)


def look_up(group: str, name: str) -> object:
    """Find a name of a group as the program does."""
    if group == "methods":
        return find_method(name)
    if group == "towers":
        return parse_backbone(name)
    if group == "networks":
        check_network(name, "scratch")
        return build_network(name)
    return find_reader(name)


def install(folder: Path, module: str, sources: dict[str, str], patch: pytest.MonkeyPatch) -> None:
    """Install a distribution of one package whose entry points are {group: "name = module:object"}."""
    (folder / f"{module}-1.0.dist-info").mkdir(parents=True)
    (folder / f"{module}-1.0.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n"
    )
    entries = "".join(f"[cafe.{group}]\n{line}\n" for group, line in sources.items())
    (folder / f"{module}-1.0.dist-info" / "entry_points.txt").write_text(entries)
    patch.syspath_prepend(str(folder))


@pytest.mark.parametrize("group", ADD)
def test_a_file_adds_what_it_fills_the_dicts_with(tmp_path: Path, group: str) -> None:
    path = write(tmp_path, SOURCES[group] + ADD[group])
    (plugin,) = load_plugins([path])
    assert (plugin.name, plugin.digest) == ("mine", sha256(Path(path).read_bytes()).hexdigest())
    assert look_up(group, f"own_{group}")
    assert find_plugins(**{group: f"own_{group}"}) == (plugin,)
    assert find_plugins(**{other: f"own_{group}" for other in ADD if other != group}) == ()
    assert load_plugins([path]) == (plugin,)


@pytest.mark.parametrize("group", ADD)
def test_an_installed_package_adds_what_its_entry_points_name(
    tmp_path: Path, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"installed_{group}"
    write(tmp_path, SOURCES[group], f"{module}.py")
    install(tmp_path, module, {group: f"theirs = {module}:{OBJECTS[group]}"}, monkeypatch)
    assert module not in sys.modules
    assert find_plugins(**{group: "theirs"}) == ()
    assert look_up(group, "theirs")
    (plugin,) = find_plugins(**{group: "theirs"})
    assert plugin.identity == f"theirs:{sha256((tmp_path / f'{module}.py').read_bytes()).hexdigest()}"


def test_a_tower_is_found_by_its_name_with_file_and_layer(tmp_path: Path) -> None:
    (plugin,) = load_plugins([write(tmp_path, TOWER + ADD["towers"])])
    (tmp_path / "tiny.pt").touch()
    name = f"own_towers@{tmp_path}/tiny.pt#stage3/2x2"
    assert parse_backbone(name).architecture == "timm:test_resnet#stage3/2x2"
    assert absolute_name(name) == f"own_towers@{tmp_path}/tiny.pt"
    assert find_plugins(towers=name, methods="linear_probe", networks=None) == (plugin,)


def test_what_nobody_asks_for_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "raise SystemExit('loaded')\n", "unasked.py")
    install(tmp_path, "unasked", {"methods": "unasked = unasked:Probe"}, monkeypatch)
    assert find_method("linear_probe") is LinearProbe
    assert "unasked" in complaint(find_method, "nothing")  # but named
    assert "unasked" not in sys.modules


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (
            "import nothing_of_that_name\n",
            "cannot be run (ModuleNotFoundError: No module named 'nothing_of_that_name', line",
        ),
        ("x = 1\n\nprint(1 / 0)\n", "cannot be run (ZeroDivisionError: division by zero, line 3): correct it."),
        ("x = (\n", "cannot be run (SyntaxError: '(' was never closed"),
        ("x = 1\n", "adds nothing: have it fill METHODS, BACKBONES, NETWORKS or DATASETS"),
        (METHOD.replace('"own_probe"', '"cafe"'), "takes the name 'cafe', which this package has among the methods"),
        ("from cafe.methods import METHODS\ndel METHODS['scn']\n", "takes the name 'scn', which this package has"),
        (METHOD + "raise ValueError('too late')\n", "cannot be run (ValueError: too late, line 10)"),
    ],
)
def test_a_file_that_is_no_plug_in_is_one_sentence_and_adds_nothing(tmp_path: Path, source: str, sentence: str) -> None:
    before = [dict(entries) for entries in (METHODS, BACKBONES, NETWORKS, DATASETS)]
    path = write(tmp_path, source)
    said = complaint(load_plugins, [path])
    assert said.startswith(f"The plug-in {path!r} {sentence}")
    assert before == [METHODS, BACKBONES, NETWORKS, DATASETS]


def test_a_file_that_is_not_there_and_a_name_that_another_has_are_one_sentence(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.py")
    assert complaint(load_plugins, [missing]).startswith(f"The plug-in {missing!r} cannot be read (")
    first, second = write(tmp_path, METHOD), write(tmp_path, f"{METHOD}\n", "other.py")
    assert complaint(load_plugins, [first, second]) == (
        f"The plug-in {second!r} takes the name 'own_probe', which the plug-in 'mine' has among the methods: choose another."
    )


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("broken = no_such_module:Probe", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("broken = broken_module:Other", "AttributeError: module 'broken_module' has no attribute 'Other'"),
    ],
)
def test_an_entry_point_that_cannot_be_loaded_is_named(
    tmp_path: Path, entry: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, SOURCES["methods"], "broken_module.py")
    install(tmp_path, "broken_module", {"methods": entry}, monkeypatch)
    assert complaint(find_method, "broken") == (
        f"The plug-in 'broken' ({entry.partition(' = ')[2]}, among the entry points cafe.methods) cannot be loaded "
        f"({reason}): correct or uninstall it."
    )


def run_elsewhere(plugin: Plugin, code: str, path: Path | None = None) -> str:
    """Install a plug-in in another process, twice, and run code there that prints."""
    program = (
        "import pickle, sys\nfrom cafe.errors import UserError\nplugin = pickle.loads(sys.stdin.buffer.read())\n"
        f"try:\n    plugin.install()\n    plugin.install()\nexcept UserError as error:\n    sys.exit(str(error))\n{code}\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(path or ""), *sys.path]))}
    done = subprocess.run(
        [sys.executable, "-c", program], input=pickle.dumps(plugin), capture_output=True, env=environment, check=False
    )
    return (done.stdout if done.returncode == 0 else done.stderr).decode().strip()


def test_a_worker_installs_the_file_it_is_sent(tmp_path: Path) -> None:
    (plugin,) = load_plugins([write(tmp_path, METHOD)])
    Path(tmp_path / "mine.py").unlink()
    ask = "from cafe.methods import find_method\nfrom cafe.plugins import find_plugins\n"
    ask += "print(find_method('own_probe').__name__, find_plugins(methods='own_probe') == (plugin,))"
    assert run_elsewhere(plugin, ask) == "Probe True"


def test_a_worker_with_another_version_of_an_installed_package_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, SOURCES["methods"], "versioned.py")
    install(tmp_path, "versioned", {"methods": "versioned = versioned:Probe"}, monkeypatch)
    find_method("versioned")
    (plugin,) = find_plugins(methods="versioned")
    ask = "from cafe.methods import find_method\nprint(find_method('versioned').__name__)"
    assert run_elsewhere(plugin, ask, tmp_path) == "Probe"
    write(tmp_path, SOURCES["methods"] + "\nNEWER = True\n", "versioned.py")
    assert "The plug-in 'versioned' is another here, " in run_elsewhere(plugin, ask, tmp_path)


def test_what_was_made_with_a_plug_in_that_is_not_loaded_is_one_sentence(tmp_path: Path) -> None:
    path = write(tmp_path, METHOD)
    wanted = f"mine:{sha256(METHOD.encode()).hexdigest()}"
    assert complaint(check_plugins, [wanted]).startswith("This needs the plug-in 'mine' with the digest ")
    load_plugins([path])
    check_plugins([wanted])
    assert ", of which another version is loaded: give its file with `cafe --plugin mine.py`" in complaint(
        check_plugins, ["mine:0123"]
    )


def test_what_was_made_with_an_installed_plug_in_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(write(tmp_path, SOURCES["methods"], "needed.py"))
    install(tmp_path, "needed", {"methods": "needed = needed:Probe"}, monkeypatch)
    check_plugins([f"needed:{sha256(path.read_bytes()).hexdigest()}"])
    assert find_plugins(methods="needed")
    assert "of which another version is loaded" in complaint(check_plugins, ["needed:0123"])


def test_the_specification_of_a_tower_of_ours_is_not_touched() -> None:
    assert isinstance(BACKBONES["clip-vit-b32"], BackboneSpec)
    assert find_plugins(towers="clip-vit-b32", methods="cafe", networks="resnet18", datasets="folder") == ()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("from cafe.methods import METHODS\nMETHODS['foo'] = 3\n",
         "adds 'foo' to the methods, and that is 3: it must be a subclass of Method."),
        ("from cafe.networks.branches import NETWORKS\nNETWORKS['foo'] = print\n", "it must be a Network."),
        ("from cafe.towers.names import BACKBONES\nBACKBONES['foo'] = 'timm'\n", "it must be a BackboneSpec."),
        ("from cafe.data.readers import DATASETS\nDATASETS['foo'] = []\n", "it must be a function that returns a Listing."),
        ("raise SystemExit(3)\n", "cannot be run (SystemExit: 3, line 1): correct it."),
    ],
)  # fmt: skip
def test_what_a_plug_in_adds_must_be_what_its_group_holds(tmp_path: Path, source: str, said: str) -> None:
    before = [dict(entries) for entries in (METHODS, BACKBONES, NETWORKS, DATASETS)]
    assert said in complaint(load_plugins, [write(tmp_path, source)])
    assert before == [METHODS, BACKBONES, NETWORKS, DATASETS]


def test_an_entry_point_must_be_what_its_group_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "Probe = 3\n", "three_module.py")
    install(tmp_path, "three_module", {"methods": "three = three_module:Probe"}, monkeypatch)
    assert complaint(find_method, "three") == (
        "The plug-in 'three' (three_module:Probe) adds 'three' to the methods, and that is 3: it must be a subclass of "
        "Method."
    )
