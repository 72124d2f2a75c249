"""What every command shares: how commands are listed and loaded, how errors end them, and how they show their work."""

from __future__ import annotations

import errno
import gc
import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from importlib import import_module
from itertools import pairwise
from threading import Event, Timer
from typing import TYPE_CHECKING, Any

import click

from cafe.errors import UserError, printable, shorten

if TYPE_CHECKING:
    import psutil

    from cafe.pipeline.process.progress import Progress
    from cafe.pipeline.workspace import Workspace


# Where click's context keeps what was asked for, and all words of the command.
QUIET, TYPED, WIDE, RECORDS = "cafe.quiet", "cafe.typed", "cafe.wide", "cafe.records"
ANYWHERE = ("--allow-urls", "--allow-private-urls", "--wide")  # options of all commands that may stand behind theirs
PIPED, WIDEST = 200, 100_000  # columns of an output that is no terminal, and of a table with --wide
SELDOM, USUAL = 100_000, gc.get_threshold()  # objects made anew, after which Python looks for garbage
# Characters beside the numbers of long work: of a bar, at least of a title, and of a terminal that has room for a bar.
BAR_WIDTH, LEAST_TITLE, ROOMY = 12, 8, 100
GRACE_SECONDS = 4.0  # for an interrupted command to put its things in order

_interrupted = Event()
_started: list[psutil.Process] = []  # by this one, when it was interrupted


class Commands(click.Group):
    """A group that lists its commands in the order of the work and ends a `UserError` with its sentence and exit code.

    `places` gives commands of other modules as {name: "module:attribute"}; a module is imported when it is first needed.
    """

    def __init__(self, *arguments: Any, places: Mapping[str, str] | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.places = dict(places or {})

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the options of a group, and note what was typed; those of `ANYWHERE` come first."""
        if ctx.parent is None:
            first = [flag for flag in ANYWHERE if flag in args]
            args = [*first, *(word for word in args if word not in first)]
            ctx.meta[TYPED] = args
        typed = list(args)
        rest = super().parse_args(ctx, args)
        _refuse_empty(self, ctx, typed[: len(typed) - len(ctx._protected_args) - len(rest)])
        return rest

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands in the order they were given."""
        return list(dict.fromkeys((*self.places, *self.commands)))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command, importing its module where it has one of its own."""
        if cmd_name in self.places and cmd_name not in self.commands:
            module, _, attribute = self.places[cmd_name].partition(":")
            self.add_command(getattr(import_module(module), attribute), cmd_name)
        return super().get_command(ctx, cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that the first word names; suggest those like it where there is none."""
        try:
            name, command, rest = super().resolve_command(ctx, args)
        except click.exceptions.NoSuchCommand as error:
            from cafe.jobs.names import suggest_command

            known = suggest_command(error.command_name, self, ctx)
            raise click.exceptions.NoSuchCommand(
                error.command_name, f"{error.message} {known}".strip(), ctx=ctx
            ) from None
        if command and not isinstance(command, click.Group):
            _refuse_empty(command, ctx, rest)
        return name, command, rest

    def make_context(self, *arguments: Any, **extra: Any) -> click.Context:
        """Read the options of this group."""
        with _printable_mistakes():
            return super().make_context(*arguments, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            with _printable_mistakes():
                return super().invoke(ctx)
        except KeyboardInterrupt:  # where no `interruptible` says what then; click's own exit code would be 1
            echo("Interrupted.", err=True)
            raise click.exceptions.Exit(130) from None
        except UserError as error:
            logging.getLogger(__name__).info("Where this was found:", exc_info=error)
            sentence = click.ClickException(printable(str(error)))
            sentence.exit_code = error.exit_code  # type: ignore[misc]  # click's own default is a class variable
            raise sentence from None
        except OSError as error:
            if error.errno in (None, errno.EPIPE):  # a library's, or click's own affair
                raise
            logging.getLogger(__name__).info("Where this was found:", exc_info=error)
            place = f"{error.filename} cannot be used" if error.filename else "A file cannot be read or written"
            raise click.ClickException(printable(f"{place} ({error.strerror}): fix that and try again.")) from None


def _refuse_empty(command: click.Command, ctx: click.Context, words: Sequence[str]) -> None:
    """Raise `UsageError` for an empty word, unless its option is empty by default.

    A shell makes one of a variable that is not set. It would count as an option left out, or as the beginning of every name:
    `cafe store rm --yes "$STORE"` would remove the only store.
    """
    taking = [option for option in command.params if isinstance(option, click.Option) and not option.is_flag]
    defaults = {flag: option.default for option in taking for flag in option.opts}
    parts = [
        part
        for word in words
        for part in ((word[:-1], "") if word.startswith("--") and word.endswith("=") else (word,))
    ]
    for before, part in pairwise(("", *parts)):
        if not part and defaults.get(before) != "":
            what = before if before in defaults else "A word of this command"
            raise click.UsageError(f"{what} is empty, as a shell's variable is that was not set: give a value.", ctx)


@contextmanager
def _printable_mistakes() -> Iterator[None]:
    """Let click name what it does not accept without the control characters in it, and what is meant by it elsewhere."""
    try:
        yield
    except click.NoSuchOption as error:
        from cafe.jobs.names import suggest_option

        command = error.ctx.command if error.ctx else None
        known = suggest_option(error.option_name, command) if command else ""
        sentence = printable(f"{error.message} {known}".strip())
        raise click.NoSuchOption(error.option_name, sentence, () if known else error.possibilities, error.ctx) from None
    except click.ClickException as error:
        error.message = printable(error.message)  # type: ignore[misc]  # click's own never changes it
        raise


class PrintableFormatter(logging.Formatter):
    """Formats what is logged, which quotes names of files and what others wrote, without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines of a record."""
        return printable(super().format(record))


def open_workspace() -> Workspace:
    """Return the workspace that `cafe --workspace` names."""
    from cafe.pipeline.workspace import Workspace

    return Workspace.at(click.get_current_context().obj)


def set_loudness(quiet: bool, verbose: bool) -> None:
    """Let all commands say less, or more: what the libraries and Ray's workers report, and where an error was found."""
    if quiet and verbose:
        raise UserError("--quiet and --verbose say the opposite: leave one of them out.")
    click.get_current_context().meta[QUIET] = quiet
    assert logging.lastResort is not None
    logging.lastResort.setFormatter(PrintableFormatter())
    if verbose:
        handler = logging.StreamHandler()
        handler.setFormatter(PrintableFormatter("%(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
        logging.basicConfig(level=logging.INFO, handlers=[handler])


def is_quiet() -> bool:
    """Whether only results and errors are wanted."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(QUIET))


def is_wide() -> bool:
    """Whether tables are as wide as they are, whatever the terminal's width."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(WIDE))


def echo(text: str, err: bool = False) -> None:
    """Print a result or a warning: with `show`, the one door to a terminal, which no control character passes."""
    click.echo(printable(text), err=err)


def say(sentence: str, err: bool = False) -> None:
    """Print what was done: no result, so nothing with --quiet."""
    if not is_quiet():
        echo(sentence, err)


def defer_gc() -> None:
    """Look for garbage seldom while a command begins, which imports and reads what it needs to its end."""
    gc.set_threshold(SELDOM)


def resume_gc() -> None:
    """Look for garbage as usual from here on, where pictures come and go, but not among what was there before."""
    if gc.get_threshold()[0] == SELDOM:
        gc.freeze()
        gc.set_threshold(*USUAL)


@contextmanager
def progress_bar(title: str, unit: str = "faces") -> Iterator[Progress]:
    """Show how far work is: a bar on a terminal, a line now and then elsewhere, records with --json, nothing if quiet.

    Yields `update(done, total)`, which also takes what is known besides.
    """
    from cafe.pipeline.process.progress import Log, no_bar

    resume_gc()
    context = click.get_current_context(silent=True)
    records = context is not None and bool(context.meta.get(RECORDS))
    shown: AbstractContextManager[Progress]
    if is_quiet() and not records:
        shown = no_bar(title, unit)
    elif records or not sys.stderr.isatty():
        shown = nullcontext(Log(title, unit, partial(echo, err=True), records))
    else:
        shown = _terminal_bar(title, unit)
    with shown as progress:

        def update(done: int, total: int, /, **facts: float) -> None:
            if _interrupted.is_set():
                raise KeyboardInterrupt
            progress(done, total, **facts)

        yield update


@contextmanager
def _terminal_bar(title: str, unit: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    from cafe.pipeline.process.progress import Pace, describe_for_bar

    console, pace = Console(stderr=True), Pace()
    bar_width = BAR_WIDTH if console.width >= ROOMY else 0
    middle = [BarColumn(bar_width)] if bar_width else []
    with Bars(TextColumn("{task.description}"), *middle, TextColumn("{task.fields[facts]}"), console=console) as bar:
        task = bar.add_task(title, total=None, facts="preparing")

        def update(done: int, total: int, /, **facts: float) -> None:
            pace.note(time.monotonic(), done)
            text = describe_for_bar(pace, done, total, unit, facts)
            room = max(LEAST_TITLE, console.width - bar_width - len(text) - 2)  # no digit is cropped: the title is
            bar.update(task, completed=done, total=total, description=shorten(title, room), facts=text)

        yield update


def _leave(then: str) -> None:
    """End the process, whatever its threads still do or wait for, and what is left of the Ray it started."""
    import psutil

    echo(f"Interrupted: {then}.", err=True)
    sys.stdout.flush()
    for process in _started:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(130)


@contextmanager
def interruptible(then: str = "the same command goes on where it was") -> Iterator[None]:
    """End the command at once when it is interrupted, saying what then; what still runs in threads ends with it.

    A library that was at work may swallow the interrupt, so it is noted too: the next step of a progress bar raises it, and
    after `GRACE_SECONDS` the process ends in any case.
    """
    import psutil  # which no short command needs, and whose import must not be interrupted

    def interrupt(number: int, frame: object) -> None:
        _interrupted.set()
        _started.extend(psutil.Process().children(recursive=True))
        limit = Timer(GRACE_SECONDS, _leave, [then])
        limit.daemon = True
        limit.start()
        raise KeyboardInterrupt

    resume_gc()
    usual = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        _leave(then)
    finally:
        signal.signal(signal.SIGINT, usual)


def show(renderable: Any) -> None:
    """Print a text or a table: as wide as the terminal, 200 columns where the output is none and COLUMNS does not say.

    With --wide a table is as wide as it is. No control character of a text or a cell passes; those of a `rich.text.Text`
    are up to who makes it.
    """
    from rich.console import Console
    from rich.text import Text

    class Screen(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(printable(text), **options)

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPED
    if is_wide() and not isinstance(renderable, str):
        width = WIDEST
    Screen(soft_wrap=False, highlight=False, markup=False, width=width).print(renderable, crop=False)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


def _keep_records(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    context.meta[RECORDS] = value


records_option = click.option(
    "--json",
    is_flag=True,
    expose_value=False,
    callback=_keep_records,
    help="Report progress as JSON on stderr, one record per line.",
)


def show_json(value: object) -> None:
    """Print lists and dicts as JSON, what is not known as null."""
    echo(json.dumps(_as_json(value), indent=2, ensure_ascii=False))


def _as_json(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: _as_json(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
