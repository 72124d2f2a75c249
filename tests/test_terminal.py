"""What all commands share on a terminal: listings in JSON, how loud they are, colours, completion, exit codes."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

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
from cafe.jobs.options import Whole
from cafe.jobs.results import sheet_tables
from cafe.jobs.terminal import Commands, echo, make_table, show, show_json
from cafe.methods import METHODS
from cafe.pipeline.workspace import Workspace
from cafe.report.sheets import Sheet, SheetCell


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
    assert folder.name in run(tmp_path, "runs")
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


def test_help_names_the_exit_codes() -> None:
    said = " ".join(CliRunner().invoke(main, ["--help"]).output.split())
    assert "Exit codes: 0 done; 1 something could not be done, what was finished is kept; 2 a mistake" in said


@pytest.mark.parametrize(("shell", "part"), [("bash", "complete -o nosort"), ("zsh", "compdef"), ("fish", "complete ")])
def test_shells_are_told_how_to_complete(shell: str, part: str) -> None:
    printed = CliRunner().invoke(main, ["completion", shell]).output
    assert part in printed
    assert "_CAFE_COMPLETE" in printed


@pytest.mark.parametrize(
    ("words", "expected"),
    [("cafe ev", {"evaluate"}), ("cafe data in", {"index"}), ("cafe evaluate x --test-time t", {"tent", "t3a"})],
)
def test_commands_options_and_choices_are_completed(words: str, expected: set[str]) -> None:
    assert completed(words) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("evaluate cafe-", {"cafe-one-s0-1", "cafe-two-s0-2"}),
        ("predict cafe-t", {"cafe-two-s0-2"}),
        ("predict t", {"table1"}),
        ("predict --model t", {"table1"}),
        ("predict pho", {"pho"}),  # whereupon the shell completes names of files
        ("report t", {"table1"}),
        ("compare --experiment t", {"table1"}),
        ("extract one tw", {"two", "twelve"}),
        ("train --source one,tw", {"one,two", "one,twelve"}),
        ("evaluate cafe-one-s0-1 --targets o", {"one"}),
        ("data audit one tw", {"two", "twelve"}),
    ],
)
def test_names_of_the_workspace_are_completed(tmp_path: Path, words: str, expected: set[str]) -> None:
    for run, experiment in (("cafe-one-s0-1", "table1"), ("cafe-two-s0-2", "cafe"), ("mlp-one-s0-3", "cafe")):
        (tmp_path / "runs" / run / "experiments").mkdir(parents=True)
        (tmp_path / "runs" / run / "run.json").touch()
        (tmp_path / "runs" / run / "experiments" / f"{experiment}.json").touch()
    (tmp_path / "manifests").mkdir()
    for name in ("one", "two", "twelve"):
        (tmp_path / "manifests" / f"{name}.parquet").touch()
    assert completed(f"cafe -w {tmp_path} {words}") == expected


def completed(words: str) -> set[str]:
    """What Bash gets, by a process that must not import what takes seconds."""
    environment = {**os.environ, "_CAFE_COMPLETE": "bash_complete", "COMP_WORDS": words}
    environment["COMP_CWORD"] = str(len(words.split()) - 1)
    code = (
        "import sys\nfrom cafe.jobs.cli import main\ntry:\n    main(prog_name='cafe')\n"
        "finally:\n    assert not {'torch', 'mlflow', 'ray', 'pyarrow', 'pandas'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return {line.partition(",")[2] for line in done.stdout.splitlines()}
