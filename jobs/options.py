"""Click options generated from the settings' dataclasses: a setting is written once, with its type, default and help."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import click
from click.shell_completion import CompletionItem

NAMED = {"run": "runs/*/run.json", "manifest": "manifests/*.parquet", "experiment": "runs/*/experiments/*.json"}
COMPLETED = {  # fields of settings
    "source": ("manifest",),
    "targets": ("manifest",),
    "experiment": ("experiment",),
    "model": ("run", "experiment"),
    "start": ("run",),
}
Command = TypeVar("Command", bound=Callable[..., Any])


def complete(*kinds: str) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """Return what completes names of such `NAMED` kinds in a workspace on this machine; of several with commas, the last.

    It looks at file names alone: what reads these files takes longer to import than a shell may wait.
    """

    def find(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
        root = Path(ctx.find_root().params.get("workspace") or "work").expanduser()
        before, comma, begun = incomplete.rpartition(",")
        paths = [path for kind in kinds for path in root.glob(NAMED[kind])]
        names = {path.parent.name if path.name == "run.json" else path.stem for path in paths}
        return sorted(before + comma + name for name in names if name.startswith(begun))

    return find


def complete_or_file(*kinds: str) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    """Return what completes such names and, where none begins so, the names of files."""
    find = complete(*kinds)

    def find_any(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        names = [CompletionItem(name) for name in find(ctx, parameter, incomplete)] if incomplete else []
        return names or [CompletionItem(incomplete, type="file")]

    return find_any


def options(settings: type[Any]) -> Callable[[Command], Command]:
    """Give a command one option per field of a settings dataclass; the command receives them as keyword arguments."""
    hints = get_type_hints(settings, include_extras=True)

    def decorate(command: Command) -> Command:
        for field in reversed(fields(settings)):
            command = _option(field, hints[field.name])(command)
        return command

    return decorate


def _option(field: Field[Any], hint: Any) -> Callable[[Command], Command]:
    about = field.metadata
    name = about.get("flag") or "--" + field.name.replace("_", "-")
    known: dict[str, Any] = {"help": about["help"], "show_default": field.default not in (None, "", (), False)}
    known |= {"required": True} if about.get("required") else {"default": field.default}
    kind = next((part for part in get_args(hint) if part is not types.NoneType), hint) if _optional(hint) else hint
    if field.name in COMPLETED:
        known["shell_complete"] = complete(*COMPLETED[field.name])
    if kind is bool:
        known |= {} if "/" in name else {"is_flag": True}
    else:
        known["type"] = _type(get_args(kind)[0] if about.get("multiple") else kind)
        known |= {key: about[key] for key in ("multiple", "metavar") if key in about}
    return click.option(name, field.name, **known)


def _optional(hint: Any) -> bool:
    return types.NoneType in get_args(hint)


def _type(kind: Any) -> Any:
    """Return click's type for choices, for a whole number with a least value, or for a plain type."""
    if get_origin(kind) is Literal:
        return click.Choice(get_args(kind))
    if get_origin(kind) is Annotated:
        return Whole(kind.__metadata__[0].ge, kind.__metadata__[0].le)
    return kind


class Whole(click.IntRange):
    """A whole number from a least to a largest one, of which help shows the least where it is of use to know."""

    def __init__(self, least: int, largest: int) -> None:
        super().__init__(min=max(least, 0) or None)
        self.least, self.largest = least, largest

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number; click ends the command for another one."""
        number = super().convert(value, param, ctx)
        if not self.least <= number <= self.largest:
            self.fail(f"{number} is not a whole number from {self.least} to {self.largest}.", param, ctx)
        return number
