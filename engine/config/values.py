"""One value: its text, its type, its name."""

from __future__ import annotations

import difflib
import types
import typing
from typing import Any

from engine.errors import ConfigError


def parse_text(text: str, kind: Any, dotted: str, where: str) -> Any:
    """A flag's or variable's text as the key's type. Lists are separated by commas."""
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        if kind in (int, float):
            return kind(text)
        if typing.get_origin(kind) is tuple:
            item = typing.get_args(kind)[0]
            return tuple(item(part.strip()) for part in text.split(",") if part.strip())
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"{where}: {dotted} must be {type_name(kind)}, is {text!r}", code="TP-1006", where=where
        ) from error
    return text


def convert(value: Any, kind: Any, dotted: str, where: str) -> Any:
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        if isinstance(value, list | tuple) and all(is_kind(v, item) for v in value):
            return tuple(value)
    elif isinstance(kind, types.UnionType):
        if any(is_kind(value, option) for option in typing.get_args(kind)):
            return value
    elif kind is float and is_kind(value, int):
        return float(value)
    elif is_kind(value, kind):
        return value
    raise ConfigError(f"{where}: {dotted} must be {type_name(kind)}, is {value!r}", code="TP-1006", where=where)


def is_kind(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def type_name(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return f"a list of {typing.get_args(kind)[0].__name__}"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(kind, str(kind))


def unknown(name: str, known: typing.Iterable[str], where: str) -> ConfigError:
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return ConfigError(
        f"{where}: unknown key '{name}'{hint}",
        code="TP-1008",
        where=where,
        evidence={"key": name, "nearest": near[0] if near else None},
        next_step="tpctl config show",
    )
