"""What the pages of README.md and docs/ point to is there, and every `cafe` command and call they show can be given."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml

import cafe
from cafe.jobs.cli import main
from cafe.pipeline.benchmark.file import read_benchmark

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
PYTHON = re.compile(r"^```(?:python|\{code-cell\})\n(.*?)^```", re.DOTALL | re.MULTILINE)
TOML = re.compile(r"^```toml\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")


def list_commands(page: Path) -> Iterator[str]:
    """The lines of a page's code blocks that call `cafe`, without prompts, pipes and comments."""
    for block in BLOCK.findall(page.read_text()):
        for line in block.splitlines():
            command = re.search(r"(?:^|\$ |&& |\| )(cafe .*)", line)
            if command:
                yield re.split(r" [#|] | && ", command[1])[0].strip()


def parse(group: click.Group, words: list[str]) -> click.Command:
    """Parse options and arguments as the command line does, and stop before anything is done."""
    context = group.make_context("cafe", list(words))
    command: click.Command = group
    while isinstance(command, click.Group) and context._protected_args:
        name, found, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert found is not None, name
        command, context = found, found.make_context(name, rest, parent=context)
    return command


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and Sphinx make them."""
    titles = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.casefold()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for link in LINK.findall(BLOCK.sub("", page.read_text())):
        file, _, anchor = link.replace("\\_", "_").partition("#")
        if re.match(r"\w+:", file):
            continue
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name} points to {link}"
        assert not anchor or anchor in headings(target), f"{page.name} points to {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_has_options_that_exist(page: Path) -> None:
    for line in list_commands(page):
        try:
            parse(main, shlex.split(line)[1:])
        except click.exceptions.Exit:
            pass  # --help
        except click.ClickException as error:
            pytest.fail(f"{page.name}: `{line}`: {error.format_message()}")


def test_every_benchmark_file_of_a_page_can_be_read(tmp_path: Path) -> None:
    blocks = [block for page in PAGES for block in TOML.findall(page.read_text()) if block.startswith("sources")]
    assert blocks
    for block in blocks:
        (tmp_path / "mine.toml").write_text(block)
        assert all(
            entry.set.keys() <= entry.recipe_settings for entry in read_benchmark(tmp_path / "mine.toml").methods
        )


def test_a_command_that_does_not_exist_is_found() -> None:
    with pytest.raises(click.ClickException):
        parse(main, ["train", "--sauce", "studio"])


def find_faults(program: str) -> list[str]:
    """What a program imports that is not there, and its calls of `cafe.…` whose name or arguments do not exist."""
    faults = []
    for node in ast.walk(ast.parse(program)):
        try:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    getattr(importlib.import_module(str(node.module)), alias.name)
            elif isinstance(node, ast.Call) and re.fullmatch(r"cafe\.\w+", called := ast.unparse(node.func)):
                keywords = {str(keyword.arg): None for keyword in node.keywords}
                inspect.signature(getattr(cafe, called.partition(".")[2])).bind(*node.args, **keywords)
        except (ImportError, AttributeError, TypeError) as error:
            faults.append(f"{ast.unparse(node)}: {error}")
    return faults


@pytest.mark.parametrize(
    "page", [page for page in PAGES if PYTHON.search(page.read_text())], ids=lambda page: page.name
)
def test_every_program_of_a_page_finds_what_it_imports_and_calls(page: Path) -> None:
    for program in PYTHON.findall(page.read_text()):
        assert find_faults(program) == []


def test_what_a_program_would_not_find_is_found() -> None:
    program = "from cafe.data import nothing\nimport cafe.nowhere\ncafe.predict('a', sauce=1)\ncafe.fry('a')\n"
    found = find_faults(program + "cafe.predict('a')")
    assert [fault.partition(":")[0] for fault in found] == [
        "from cafe.data import nothing",
        "import cafe.nowhere",
        "cafe.predict('a', sauce=1)",
        "cafe.fry('a')",
    ]


@pytest.mark.parametrize(
    "place", [*PAGES, ROOT / "cafe", ROOT / "jobs", ROOT / "pipeline"], ids=lambda place: place.name
)
def test_nobody_is_sent_to_another_project_of_this_name(place: Path) -> None:
    files = [file for file in place.rglob("*.*") if file.suffix in {".py", ".md", ".sh", ".yaml"}] or [place]
    for file in files:
        found = re.search(r"pip install [^`\n]*(?<![\w./])cafe(?![\w./-])", file.read_text())
        assert not found, f"{file} installs by name what only a checkout or a wheel of this project has: {found[0]}"


def test_the_version_is_one_everywhere() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == cafe.__version__
    assert re.search(rf"^## {re.escape(cafe.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_the_readme_is_short_enough_to_be_read() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 900
