"""Click options generated from the settings' dataclasses: a setting is written once, with its default and its help."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Any, TypeVar, get_args, get_type_hints

import click

Command = TypeVar("Command", bound=Callable[..., Any])


def options(settings: type[Any]) -> Callable[[Command], Command]:
    """Give a command one option per field of a settings dataclass; the command receives them as keyword arguments."""
    hints = get_type_hints(settings)

    def decorate(command: Command) -> Command:
        for field in reversed(fields(settings)):
            command = _option(field, hints[field.name])(command)
        return command

    return decorate


def _option(field: Field[Any], hint: Any) -> Callable[[Command], Command]:
    about = field.metadata
    kind = next((part for part in get_args(hint) if part is not types.NoneType), hint) if get_args(hint) else hint
    name = about.get("flag") or "--" + field.name.replace("_", "-")
    known: dict[str, Any] = {"help": about["help"], "show_default": field.default not in (None, "", (), False)}
    if about.get("required"):
        known["required"] = True
    else:
        known["default"] = field.default
    if kind is bool and "/" not in name:
        known["is_flag"] = True
    elif about.get("multiple"):
        known |= {"multiple": True, "metavar": "KEY=VALUE"}
    elif "choices" in about:
        known["type"] = click.Choice(about["choices"])
    elif kind is int:
        known["type"] = click.IntRange(min=about.get("minimum"))
    elif kind is not bool:
        known["type"] = kind
    return click.option(name, field.name, **known)
