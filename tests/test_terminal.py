"""What all commands share on a terminal: listings in JSON, how loud they are, colours, completion, exit codes."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import draw_faces
from runs import write_predictions, write_run

from cafe.data.expressions import EXPRESSIONS
from cafe.errors import UNPRINTABLE, printable
from cafe.inference.output import build_schema, write_table
from cafe.jobs.cli import main
from cafe.jobs.names import list_settings, read_dict
from cafe.jobs.options import GROUPS, Whole
from cafe.jobs.runs import SHIPPED
from cafe.jobs.tables import make_table, sheet_tables
from cafe.jobs.terminal import LEAST_TITLE, Commands, echo, show, show_json
from cafe.methods import METHODS, find_method
from cafe.networks.branches import NETWORKS
from cafe.pipeline.plan import find_recipe
from cafe.pipeline.process.advice import explain_few_steps, foretell
from cafe.pipeline.process.progress import Log, Pace, describe_for_bar, format_rate
from cafe.pipeline.runs import note_end
from cafe.pipeline.settings import TrainSettings
from cafe.pipeline.workspace import Workspace
from cafe.report.sheets.sheet import Sheet, SheetCell
from cafe.towers.names import BACKBONES


def run(tmp_path: Path, *arguments: str, code: int = 0) -> str:
    """Run a command in a workspace and return its standard output, or what it complains of."""
    result = CliRunner().invoke(main, ["-w", str(tmp_path / "work"), *arguments])
    assert result.exit_code == code, result.output
    return result.stderr if code else result.stdout


def test_every_listing_is_json_on_request(tmp_path: Path) -> None:
    assert json.loads(run(tmp_path, "data", "list", "--json")) == []
    faces = draw_faces(tmp_path / "faces", per_class=5)
    run(tmp_path, "data", "index", "folder", str(faces), "--name", "mine")
    (listed,) = json.loads(run(tmp_path, "data", "list", "--json"))
    assert listed["manifest"] == "mine"
    assert listed["faces"] == listed["train"] + listed["test"]
    assert (listed["features"], listed["classes"]) == ([], 7)

    assert "No run in" in run(tmp_path, "runs")
    workspace, labels = Workspace.at(str(tmp_path / "work")), np.arange(14) % 7
    folder = write_run(workspace, "scn", source="mine", source_kind="folder")
    write_predictions(folder, "mine", labels, labels, manifest=workspace.load_manifest("mine").digest)
    (listed,) = json.loads(run(tmp_path, "runs", "--json"))
    assert (listed["run"], listed["status"], listed["experiments"]) == (folder.name, "FINISHED", ["cafe"])
    assert (listed["at_home"], listed["unseen"], listed["epochs"], listed["ended"]) == (1.0, None, 0, None)
    note_end(folder)
    (listed,) = json.loads(run(tmp_path, "runs", "--json"))
    assert datetime.now() - datetime.fromisoformat(listed["ended"]) < timedelta(minutes=2)
    shown = run(tmp_path, "runs")
    assert folder.name in shown
    assert "100.0" in shown
    cell, *_, mean = json.loads(run(tmp_path, "compare", "--json"))["cells"]
    assert (cell["target"], cell["role"], cell["mean"], cell["half_width"]) == ("mine", "source", 1.0, None)
    assert (mean["target"], mean["mean"]) == ("mean of all", 1.0)

    listed = json.loads(run(tmp_path, "methods", "--json"))
    assert [record["method"] for record in listed] == list(METHODS)
    assert listed[0] | {"about": ""} == {"method": "cafe", "reads": ["features", "image"], "epochs": 60, "about": ""}


def test_quiet_leaves_results_and_errors(tmp_path: Path) -> None:
    faces = str(draw_faces(tmp_path / "faces", per_class=5))
    index = ("data", "index", "folder", faces, "--name")
    assert "Wrote" in run(tmp_path, *index, "loud")
    quiet = run(tmp_path, "--quiet", *index, "quiet")
    assert "quiet: " in quiet
    assert "Wrote" not in quiet
    assert run(tmp_path, "-q", "data", "check", "nobody", code=2).startswith("Error: ")
    assert "say the opposite" in run(tmp_path, "-qv", "data", "list", code=2)


def test_verbose_says_where_a_mistake_was_found(tmp_path: Path) -> None:
    def complain(*options: str) -> str:
        command = [
            sys.executable,
            "-m",
            "cafe.jobs.cli",
            *options,
            "data",
            "index",
            "nothing",
            str(tmp_path),
            "--name",
            "x",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        return done.stderr

    assert len(complain().splitlines()) == 1
    assert "Traceback" in complain("--verbose")


def test_a_command_ends_with_its_code_after_all_that_its_libraries_do_at_the_end() -> None:
    code = (
        "import atexit, click\nfrom cafe.jobs import cli\n@cli.main.command()\ndef work() -> None:\n"
        "    atexit.register(print, 'ended', 1 << 20)\n    print('said')\n    click.get_current_context().exit(3)\ncli.run()"
    )
    done = subprocess.run([sys.executable, "-c", code, "work"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "said\nended 1048576\n", "")
    with Path("/dev/full").open("w") as full:
        lost = subprocess.run(
            [sys.executable, "-m", "cafe.jobs.cli", "--help"], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert lost.returncode


def test_garbage_is_looked_for_seldom_only_until_the_work_begins() -> None:
    code = (
        "import gc\nfrom cafe.jobs import cli\nfrom cafe.jobs.terminal import interruptible, progress_bar\n"
        "usual = gc.get_threshold()\n"
        "@cli.main.command()\ndef work() -> None:\n    print(gc.get_threshold() == usual)\n"
        "    with {work}: print(gc.get_threshold() == usual, gc.get_freeze_count() > 1000)\ncli.run()"
    )
    for work in ("interruptible()", "progress_bar('Working')"):
        command = [sys.executable, "-c", code.format(work=work), "work"]
        assert subprocess.check_output(command, text=True) == "False\nTrue True\n"


def show_on_terminal(code: str, **environment: str) -> str:
    """Return what a program writes to a terminal."""
    mine, theirs = pty.openpty()
    known = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", **environment}
    with subprocess.Popen([sys.executable, "-c", code], stdout=theirs, stderr=theirs, env=known) as program:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(mine, 4096)
            except OSError:  # Linux's end of a terminal
                break
            if not part:
                break
            shown += part
    os.close(mine)
    assert program.returncode == 0, shown
    return shown.decode()


def test_no_color_switches_colours_off() -> None:
    code = "from cafe.jobs.terminal import progress_bar\nwith progress_bar('Working') as update: update(1, 2)"
    coloured, plain = show_on_terminal(code, NO_COLOR=""), show_on_terminal(code, NO_COLOR="1")
    assert "Working" in plain
    assert "\x1b[38;5;" in coloured
    assert "\x1b[38;5;" not in plain
    assert "\x1b[3" not in plain


NASTY = "\x1b]0;owned\x07\x9b2J\u202egpj.\udcff"
HARMLESS = r"\u001b]0;owned\u0007\u009b2J\u202egpj.\udcff"


def test_what_is_printable_stays_and_what_moves_a_terminal_is_spelt_out() -> None:
    plain = "naïve\t顔 عربي 👩\u200d🚀\n–\xa0"
    assert printable(plain) == plain
    assert printable(NASTY) == HARMLESS
    assert json.loads(printable(json.dumps(NASTY, ensure_ascii=False))) == NASTY
    every = "".join(map(chr, [*range(0xE000), 0x1F600]))
    assert not {*"\x00\x07\x08\x0b\r\x1b\x7f\x80\x9b\x9d\x9f\u061c\u200e\u2066\udc80"} & set(printable(every))


def test_commands_write_to_the_terminal_through_what_makes_it_printable() -> None:
    sources = (Path(__file__).parents[1] / "jobs").glob("*.py")
    raw = [path.name for path in sources if re.search(r"\b(click\.s?echo|print)\(", path.read_text())]
    assert raw == ["terminal.py"]


def test_no_output_of_a_command_holds_control_characters_of_what_it_shows(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for part in (NASTY, make_table([NASTY], [[NASTY]], title=NASTY)):
        show(part)
    sheet = Sheet(NASTY, 1, 1, [NASTY], [[SheetCell(NASTY)]], [NASTY])
    for part in sheet_tables([sheet]):
        show(part)
    show_json({NASTY: [NASTY, float("nan")]})
    echo(NASTY, err=True)
    shown = capsys.readouterr()
    assert shown.out.count(HARMLESS) == 10
    assert shown.err == f"{HARMLESS}\n"
    assert not UNPRINTABLE.search(shown.out)

    mistakes = (
        [NASTY],
        ["data", NASTY],
        ["runs", f"--{NASTY}"],
        ["compare", NASTY],
        ["predict", NASTY, "x"],
    )
    for arguments in mistakes:
        said = run(tmp_path, *arguments, code=2)
        assert "]0;owned" in said
        assert not UNPRINTABLE.search(said)
    record = logging.LogRecord("cafe", logging.WARNING, "", 0, "Left out: %s", (NASTY,), None)
    assert logging.lastResort is not None
    assert logging.lastResort.format(record) == f"Left out: {HARMLESS}"

    rows = io.BytesIO()
    with write_table(rows, EXPRESSIONS) as write:
        write([dict.fromkeys(build_schema(EXPRESSIONS).names) | {"file": f"{NASTY}\nneutral", "error": NASTY}])
    assert rows.getvalue().decode().splitlines()[1].endswith(f"{HARMLESS}\\nneutral: {HARMLESS}")


@pytest.mark.parametrize("place", ["file", "none"])
def test_what_the_system_refuses_is_one_sentence(place: str) -> None:
    @click.group(cls=Commands)
    def group() -> None:
        pass

    @group.command()
    def work() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", *([NASTY] if place == "file" else []))

    @group.command()
    def library() -> None:
        raise OSError("no number: a bug of a library's")

    result = CliRunner().invoke(group, ["work"])
    what = f"{HARMLESS} cannot be used" if place == "file" else "A file cannot be read or written"
    assert (result.exit_code, result.stderr) == (
        1,
        f"Error: {what} (No space left on device): fix that and try again.\n",
    )
    assert isinstance(CliRunner().invoke(group, ["library"]).exception, OSError)


def test_an_interrupted_command_ends_with_130_wherever_it_was() -> None:
    @click.group(cls=Commands)
    def group() -> None:
        pass

    @group.command()
    def load() -> None:
        raise KeyboardInterrupt

    result = CliRunner().invoke(group, ["load"])
    assert (result.exit_code, result.stderr) == (130, "Interrupted.\n")


def list_options(command: click.Command, ctx: click.Context) -> Iterator[click.Parameter]:
    """All options of a command and of those below it."""
    yield from command.params
    for name in command.list_commands(ctx) if isinstance(command, click.Group) else ():
        yield from list_options(command.get_command(ctx, name) or command, ctx)


def test_every_whole_number_has_a_least_and_a_largest(tmp_path: Path) -> None:
    found = [option for option in list_options(main, click.Context(main)) if option.type.name.startswith("integer")]
    assert len(found) > 40
    for option in found:
        bounds = (option.type.least, option.type.largest) if isinstance(option.type, Whole) else ()
        assert bounds or (isinstance(option.type, click.IntRange) and None not in (option.type.min, option.type.max))
    for option, value in (("--view-seed", 2**63), ("--views", 2**31), ("--threads", 5000), ("--image-size", 8)):
        assert str(value) in run(tmp_path, "train", "--source", "x", option, str(value), code=2)
    assert "Unknown manifest 'x'" in run(tmp_path, "train", "--source", "x", "--seed", str(-(2**63)), code=2)
    assert "[x>=1]" in CliRunner().invoke(main, ["train", "--help"]).output


def walk(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """All commands below one, with the words that call them."""
    for name in command.list_commands(click.Context(main)) if isinstance(command, click.Group) else ():
        below = command.get_command(click.Context(main), name)
        assert below is not None
        yield (*path, name), below
        yield from walk(below, (*path, name))


def test_listings_of_commands_show_their_whole_summaries() -> None:
    for path, command in [((), main), *walk(main)]:
        if isinstance(command, click.Group):
            listed = CliRunner().invoke(main, [*path, "--help"], terminal_width=80).output.partition("Commands:")[2]
            assert "..." not in listed, path
        else:
            summary = (command.help or "").partition("\n")[0]
            assert summary == command.get_short_help_str(80), path
            assert not {"`", "e.g"} & {summary[i : i + 3] for i in range(len(summary))}, path


def test_options_are_in_groups_and_the_required_first() -> None:
    said = CliRunner().invoke(main, ["train", "--help"]).output
    places = [said.index(f"\n{name}:") for name in GROUPS]
    assert places == sorted(places)
    headed = {
        name: said.index(f"  {name} ") for name in ("--source", "--method", "--targets", "--backbone", "--threads")
    }
    assert list(headed.values()) == sorted(headed.values())
    assert said.index("\nTracking:") < said.index("  --mlflow-uri ") < said.index("\nOptions:")
    assert "x<=None" not in said


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("cmpare", "Did you mean 'compare'?"),
        ("index", "Did you mean 'data index'?"),
        ("data chek", "Did you mean 'check'?"),
        ("train --lr 0.1", "It is a setting of every method's recipe: --set learning_rate=VALUE."),
        ("train --batch-size 8", "It is a setting of every method's recipe: --set batch_size=VALUE."),
        ("train --optimizer adamw", "cafe_map, cafe_vector, cafe_self, linear_probe, mlp: --set optimizer=VALUE."),
        ("train --device cpu", "Give --gpu or --cpu."),
        ("train --sorce news", "'--source'"),
        ("compare --lr 0.1", "No such option '--lr'."),
    ],
)
def test_what_other_programs_call_it_leads_to_what_it_is_called_here(tmp_path: Path, words: str, remedy: str) -> None:
    assert remedy in run(tmp_path, *words.split(), code=2)


def test_what_is_read_of_the_source_is_what_the_source_makes() -> None:
    assert list(read_dict("cafe.methods", "METHODS")) == list(METHODS)
    assert list(read_dict("cafe.towers.names", "BACKBONES")) == list(BACKBONES)
    assert list(read_dict("cafe.networks.branches", "NETWORKS")) == list(NETWORKS)
    for name, method in METHODS.items():
        assert sorted(list_settings(name)) == sorted(field.name for field in fields(method.recipe_type)), name
    assert list_settings("nothing") == []


def test_help_names_every_image_branch_and_every_benchmark_file_that_ships() -> None:
    train, benchmark = (
        " ".join(CliRunner().invoke(main, [name, "--help"]).output.split()) for name in ("train", "benchmark")
    )
    assert train.partition("Image branch: ")[2].partition(". ")[0].split(", ") == list(NETWORKS)
    named = benchmark.partition("with this package come ")[2].partition(" (.toml)")[0]
    assert re.split(", | and ", named) == sorted(file.stem for file in SHIPPED.glob("*.toml"))


def test_help_names_the_exit_codes() -> None:
    said = " ".join(CliRunner().invoke(main, ["--help"]).output.split())
    assert "Exit codes: 0 done; 1 something could not be done, what was finished is kept; 2 a mistake" in said


@pytest.mark.parametrize(("shell", "part"), [("bash", "complete -o nosort"), ("zsh", "compdef"), ("fish", "complete ")])
def test_shells_are_told_how_to_complete(shell: str, part: str) -> None:
    printed = CliRunner().invoke(main, ["completion", shell]).output
    assert part in printed
    assert "_CAFE_COMPLETE" in printed


COMPLETED = {  # what is typed: what a shell completes it to
    "ev": {"evaluate"},
    "data in": {"index"},
    "evaluate x --test-time t": {"tent", "t3a"},
    "evaluate cafe-": {"cafe-one-s0-1", "cafe-two-s0-2"},
    "predict cafe-t": {"cafe-two-s0-2"},
    "predict t": {"table1"},
    "predict --model t": {"table1"},
    "predict pho": {"pho"},  # whereupon the shell completes names of files
    "report t": {"table1"},
    "compare --experiment t": {"table1"},
    "compare --per-class tw": {"two", "twelve"},
    "extract one tw": {"two", "twelve"},
    "train --source one,tw": {"one,two", "one,twelve"},
    "evaluate cafe-one-s0-1 --targets o": {"one"},
    "data audit one tw": {"two", "twelve"},
    "train --method linear": {"linear_probe"},
    "train --method scn --set relabel_": {"relabel_after=", "relabel_margin="},
    "train --backbone face": {"face-resnet"},
    "train --network mob": {"mobilenet_v2"},
    "tower clip": {"clip-vit-b32"},
    "tower pro": {"probe"},
}


@pytest.fixture(scope="module")
def completed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What shells get for all of these, from a process that must not import what takes seconds."""
    root = tmp_path_factory.mktemp("work")
    for run, experiment in (("cafe-one-s0-1", "table1"), ("cafe-two-s0-2", "cafe"), ("mlp-one-s0-3", "cafe")):
        (root / "runs" / run / "experiments").mkdir(parents=True)
        (root / "runs" / run / "run.json").touch()
        (root / "runs" / run / "experiments" / f"{experiment}.json").touch()
    (root / "manifests").mkdir()
    for name in ("one", "two", "twelve"):
        (root / "manifests" / f"{name}.parquet").touch()
    code = (
        "import json, sys\nfrom click.shell_completion import ShellComplete\nfrom cafe.jobs.cli import main\n"
        "shell, found = ShellComplete(main, {}, 'cafe', '_CAFE_COMPLETE'), {}\n"
        "for words in sys.argv[2:]:\n    *before, begun = words.split()\n"
        "    items = shell.get_completions(['-w', sys.argv[1], *before], begun)\n"
        "    found[words] = [item.value for item in items]\n"
        "assert not {'torch', 'mlflow', 'ray', 'pyarrow', 'pandas'} & set(sys.modules)\nprint(json.dumps(found))"
    )
    command = [sys.executable, "-c", code, str(root), *COMPLETED]
    found: dict[str, list[str]] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return found


@pytest.mark.parametrize("words", COMPLETED)
def test_commands_options_and_names_are_completed(completed: dict[str, list[str]], words: str) -> None:
    assert set(completed[words]) == COMPLETED[words]


def test_a_log_says_after_an_epoch_and_every_half_minute_how_far_work_is_at_what_rate_and_how_long_yet() -> None:
    now, lines = [0.0], list[str]()
    log = Log("Training x", "steps", lines.append, clock=lambda: now[0])
    for now[0], done, facts in (
        (1.0, 10, {"epochs_done": 0, "epochs": 4}),
        (2.0, 20, {"epochs_done": 1, "epochs": 4, "loss": 1.5, "accuracy": 0.5}),  # too soon after the beginning
        (11.0, 110, {"epochs_done": 1, "epochs": 4, "loss": 1.5, "accuracy": 0.5}),
        (12.0, 120, {"epochs_done": 1, "epochs": 4, "loss": 1.5, "accuracy": 0.5}),
        (40.0, 120, {"epochs_done": 1, "epochs": 4, "loss": 1.5, "accuracy": 0.5}),
        (41.0, 120, {"epochs_done": 1, "epochs": 4, "loss": 1.5, "accuracy": 0.5}),
        (61.0, 1000, {"epochs_done": 4, "epochs": 4, "loss": 0.25, "accuracy": 0.987}),
    ):
        log(done, 1000, **facts)
    assert lines == [
        "Training x: 1 of 4 epochs, loss 1.500, training accuracy 50.0 %, 110 of 1,000 steps, 10.0/s, 0:01:29 left",
        "Training x: 1 of 4 epochs, loss 1.500, training accuracy 50.0 %, 120 of 1,000 steps, 10.0/s, 0:01:28 left",
        "Training x: 4 of 4 epochs, loss 0.250, training accuracy 98.7 %, 1,000 of 1,000 steps, 18.0/s",
    ]


def test_a_bar_on_a_narrow_terminal_keeps_every_digit() -> None:
    pace = Pace()
    for seconds, done in ((0.0, 1), (10.0, 11)):
        pace.note(seconds, done)
    facts = {"epochs_done": 12, "epochs": 40, "loss": 0.0625, "accuracy": 1.0}
    text = describe_for_bar(pace, 11, 911, "steps", facts)
    assert text == "12/40 epochs, loss 0.062, train 100.0 %, 1.0 steps/s, 0:15:00 left"
    assert len(text) + LEAST_TITLE < 80
    assert describe_for_bar(Pace(), 5, 1200, "faces", {}) == "5/1,200 faces"


def test_records_say_each_news_once_and_the_end() -> None:
    now, lines = [0.0], list[str]()
    log = Log("Extracting", "faces", lines.append, records=True, clock=lambda: now[0])
    for now[0], done in ((0.25, 1), (0.5, 2), (1.5, 6), (1.75, 8)):
        log(done, 8)
    first, last = (json.loads(line) for line in lines)
    assert first == {"work": "Extracting", "unit": "faces", "done": 6, "total": 8, "rate": 4.0, "seconds_left": 0.5}
    assert (last["done"], last["rate"], last["seconds_left"]) == (8, pytest.approx(7 / 1.5), 0.0)


def test_few_steps_of_the_published_size_are_said_with_what_learns_more() -> None:
    def say(faces: int, *overrides: str, **settings: Any) -> str:
        chosen = TrainSettings(source="any", overrides=overrides, **settings)
        return " ".join(explain_few_steps(faces, asdict(find_recipe(chosen, "folder")), chosen))

    assert say(180, method="cafe", epochs=8).startswith(
        "180 training faces make 48 steps, and the published learning rate"
    )
    assert "--set learning_rate=0.001 --set features=standardised learns more" in say(180, method="linear_probe")
    assert "features=" not in say(180, "features=standardised", method="linear_probe")
    assert "features=" not in say(180, method="image_only")
    assert say(180, "learning_rate=0.001", method="cafe") == say(12_271, method="cafe") == say(180, method="scn") == ""
    assert say(180, method="nearest_class_mean") == say(180, method="mlp", start="shipped") == ""


def test_a_slow_rate_is_not_rounded_to_none() -> None:
    assert [format_rate(rate) for rate in (1234.56, 18.0, 1.0, 0.95, 0.04, 0.0021)] == [
        "1,234.6",
        "18.0",
        "1.0",
        "0.95",
        "0.04",
        "0.0021",
    ]


def test_how_long_a_training_without_a_gpu_takes_is_said_with_what_shortens_it() -> None:
    said = foretell(12_000, 40, 224)
    assert "about 3:20:00 more" in said
    assert "--epochs 10 instead of 40, --image-size 112 instead of 224, or a method that learns from features" in said
    for method in ("cafe_vector", "mlp"):
        assert method in said
        assert "image" not in find_method(method).needs
    assert "Shorter: --epochs 1 instead of 2, or a method" in foretell(12_000, 2, 32)
    assert "Shorter: a method" in foretell(12_000, 1, 16)
