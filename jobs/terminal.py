"""What every command shares: how commands are listed and loaded, how errors end them, and how they show their work."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from threading import Event
from typing import TYPE_CHECKING, Any

import click

from cafe.errors import UserError

if TYPE_CHECKING:
    from pipeline.workspace import Workspace


_interrupted = Event()


class Commands(click.Group):
    """A group that lists its commands in the order of the work and ends a `UserError` with its sentence and exit code.

    `places` gives commands of other modules as {name: "module:attribute"}; a module is imported when it is first needed.
    """

    def __init__(self, *arguments: Any, places: Mapping[str, str] | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.places = dict(places or {})

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands in the order they were given."""
        return list(dict.fromkeys((*self.places, *self.commands)))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command, importing its module where it has one of its own."""
        if cmd_name in self.places and cmd_name not in self.commands:
            module, _, attribute = self.places[cmd_name].partition(":")
            self.add_command(getattr(import_module(module), attribute), cmd_name)
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            sentence = click.ClickException(str(error))
            sentence.exit_code = error.exit_code  # type: ignore[misc]  # click's own default is a class variable
            raise sentence from None


def open_workspace() -> Workspace:
    """Return the workspace that `cafe --workspace` names."""
    from pipeline.workspace import Workspace

    return Workspace.at(click.get_current_context().obj)


@contextmanager
def progress_bar(title: str, unit: str = "faces") -> Iterator[Callable[[int, int], None]]:
    """Show one bar with rate and time left on a terminal, and nothing elsewhere; yields `update(done, total)`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{unit} {{task.fields[rate]}}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, rate="")

        def update(done: int, total: int) -> None:
            if _interrupted.is_set():
                raise KeyboardInterrupt
            speed = bar.tasks[task].speed
            bar.update(task, completed=done, total=total, rate=f"{speed:,.1f}/s" if speed else "")

        yield update


def _interrupt(number: int, frame: object) -> None:
    _interrupted.set()
    raise KeyboardInterrupt


@contextmanager
def interruptible(then: str = "the same command goes on where it was") -> Iterator[None]:
    """End the command at once when it is interrupted, saying what then; what still runs in threads ends with it.

    A library that was at work may swallow the interrupt, so it is noted too: the next step of a progress bar raises it.
    """
    usual = signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"Interrupted: {then}.", err=True)
        sys.stdout.flush()
        os._exit(130)  # a thread that still waits for the Ray just left must not keep the command alive
    finally:
        signal.signal(signal.SIGINT, usual)


def show(renderable: Any) -> None:
    """Print a text or a table of rich, 200 columns wide where the output is not a terminal."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 200
    Console(soft_wrap=False, highlight=False, markup=False, width=width).print(renderable)
