"""Click options generated from the settings' dataclasses: a setting is written once, with its type, default and help."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import click

from cafe.jobs.names import complete, complete_setting

COMPLETED = {  # fields of settings
    "source": complete("manifest"),
    "targets": complete("manifest"),
    "fold": complete("manifest"),
    "experiment": complete("experiment"),
    "model": complete("run", "experiment"),
    "start": complete("run"),
    "method": complete("method"),
    "backbone": complete("tower"),
    "network": complete("network"),
    "overrides": complete_setting,
    "by": complete("column"),
}
REQUIRED, OTHERS = "Required", "Options"
GROUPS = (REQUIRED, "What is trained", "Data", "Features", "Machine", "Tracking", OTHERS)  # in the order of help
Command = TypeVar("Command", bound=Callable[..., Any])


class GroupedOption(click.Option):
    """An option that help shows under a heading: `group` is one of `GROUPS`."""

    def __init__(self, *names: Any, group: str = OTHERS, **about: Any) -> None:
        super().__init__(*names, **about)
        self.group = REQUIRED if self.required else group


class GroupedCommand(click.Command):
    """A command whose help shows its options in groups, those that are required first."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section for every group that has an option."""
        groups: dict[str, list[tuple[str, str]]] = {name: [] for name in GROUPS}
        for option in self.get_params(ctx):
            if not isinstance(option, click.Argument) and (line := option.get_help_record(ctx)):
                groups[getattr(option, "group", OTHERS)].append(line)
        for name, lines in groups.items():
            if lines:
                with formatter.section(name):
                    formatter.write_dl(lines)


def options(settings: type[Any]) -> Callable[[Command], Command]:
    """Give a command one option per field of a settings dataclass; the command receives them as keyword arguments."""
    hints = get_type_hints(settings, include_extras=True)

    def decorate(command: Command) -> Command:
        for field in reversed(fields(settings)):
            command = _option(field, hints[field.name], _find_group(settings, field))(command)
        return command

    return decorate


def _find_group(settings: type[Any], field: Field[Any]) -> str:
    """Return the group of a setting: its own, or that of the class it stands in."""
    (owner,) = [kind for kind in settings.__mro__ if field.name in vars(kind).get("__annotations__", ())][-1:]
    return str(field.metadata.get("group") or vars(owner).get("GROUP", OTHERS))


def _option(field: Field[Any], hint: Any, group: str) -> Callable[[Command], Command]:
    about = field.metadata
    name = about.get("flag") or "--" + field.name.replace("_", "-")
    known: dict[str, Any] = {"help": about["help"], "show_default": field.default not in (None, "", (), False)}
    known |= {"required": True} if about.get("required") else {"default": field.default}
    kind = next((part for part in get_args(hint) if part is not types.NoneType), hint) if _optional(hint) else hint
    if field.name in COMPLETED:
        known["shell_complete"] = COMPLETED[field.name]
    if kind is bool:
        known |= {} if "/" in name else {"is_flag": True}
    else:
        known["type"] = _type(get_args(kind)[0] if about.get("multiple") else kind)
        known |= {key: about[key] for key in ("multiple", "metavar") if key in about}
    return click.option(name, field.name, cls=GroupedOption, group=group, **known)


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

    name = "integer"

    def __init__(self, least: int, largest: int) -> None:
        super().__init__(min=max(least, 0) or None)
        self.least, self.largest = least, largest

    def _describe_range(self) -> str:
        return super()._describe_range() if self.min else ""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number; click ends the command for another one."""
        number = super().convert(value, param, ctx)
        if not self.least <= number <= self.largest:
            self.fail(f"{number} is not a whole number from {self.least} to {self.largest}.", param, ctx)
        return number
