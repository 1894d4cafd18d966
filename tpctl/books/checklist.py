"""A checklist: one file, one page, and a command behind every item. Loading is pure; nothing runs here."""

from __future__ import annotations

import re
import shlex
import textwrap
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from tpctl.books.expect import Expect
from tpctl.books.place import CHECKLISTS, BookError, ids, pick

FEWEST, MOST = 5, 9
WIDTH = 80
ID = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


class Mode(StrEnum):
    """READ-DO: each item is read, then done. DO-CONFIRM: done from memory, then confirmed item by item."""

    read_do = "READ-DO"
    do_confirm = "DO-CONFIRM"


@dataclass(frozen=True)
class Item:
    """One question and the command that answers it.

    `drill` turns it red: the id of a drill, or of a cause (`tpctl.books.cause`); or, where only a configuration is
    asked about, options beginning with `--` that, added to the command, make it a wrong one.
    `on_fail` is the runbook to open.
    """

    id: str
    text: str
    why: str
    command: str
    expect: Expect
    tripwire: str
    drill: str
    on_fail: str

    @property
    def argv(self) -> list[str]:
        return shlex.split(self.command)


@dataclass(frozen=True)
class Checklist:
    id: str
    title: str
    topic: str
    mode: Mode
    pause_point: str
    budget_s: float
    contract: tuple[str, ...]
    forbidden: tuple[str, ...]
    instrumentation: tuple[str, ...]
    items: tuple[Item, ...]
    text: bytes = b""


def load(name: str) -> Checklist:
    """The checklist of that id.

    Raises:
        BookError: there is none, or its file is wrong.
    """
    pick("checklist", ids(CHECKLISTS, ".toml"), name)
    return parse(name, (CHECKLISTS / f"{name}.toml").read_bytes())


def load_all() -> tuple[Checklist, ...]:
    return tuple(load(name) for name in ids(CHECKLISTS, ".toml"))


def parse(name: str, text: bytes) -> Checklist:
    """A checklist from the bytes of its file.

    Raises:
        BookError: a key that is missing, unknown or of the wrong type; too few or too many items; an id twice.
    """
    try:
        data = tomllib.loads(text.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise _wrong(name, f"cannot be read: {error}") from None
    rows = data.pop("item", [])
    keys = {item.name for item in fields(Checklist)} - {"items", "text"}
    _same_keys(name, data, keys)
    if data["id"] != name or not ID.fullmatch(name):
        raise _wrong(name, f"its id is {data['id']!r}, which must be the file's name, in small letters and dashes")
    if data["mode"] not in list(Mode):
        raise _wrong(name, f"mode is {data['mode']!r}; it is one of {', '.join(Mode)}")
    if not FEWEST <= len(rows) <= MOST:
        raise _wrong(name, f"has {len(rows)} items; a page holds {FEWEST} to {MOST}")
    items = tuple(_item(name, row) for row in rows)
    if len({item.id for item in items}) < len(items):
        raise _wrong(name, "two items have one id")
    for key in ("contract", "forbidden", "instrumentation"):
        if not data[key] or not all(isinstance(line, str) for line in data[key]):
            raise _wrong(name, f"{key} must be a list of sentences, and not empty")
        data[key] = tuple(data[key])
    return Checklist(**{**data, "mode": Mode(data["mode"])}, items=items, text=text)


def _item(name: str, row: Mapping[str, Any]) -> Item:
    where = f"{name}, item {row.get('id')!r}"
    _same_keys(where, row, {item.name for item in fields(Item)})
    expect = dict(row["expect"])
    codes = expect.pop("exit", 0)
    if unknown := sorted(expect.keys() - {"path", "value", "least", "most"}):
        raise _wrong(where, f"unknown key 'expect.{unknown[0]}'")
    if ("path" in expect) != bool({"value", "least", "most"} & expect.keys()):
        raise _wrong(where, "expect.path needs a value, or a least or a most, and they need it")
    expected = Expect(exit=tuple(codes) if isinstance(codes, list) else (int(codes),), **expect)
    item = Item(**{**row, "expect": expected})
    if not item.command.startswith("tpctl "):
        raise _wrong(where, f"its command is {item.command!r}; every item is a tpctl command")
    return item


def _same_keys(where: str, row: Mapping[str, Any], wanted: set[str]) -> None:
    for word, keys in (("misses", wanted - row.keys()), ("has the unknown key", row.keys() - wanted)):
        if keys:
            raise _wrong(where, f"{word} '{sorted(keys)[0]}'")


def _wrong(where: str, what: str) -> BookError:
    return BookError(f"checklist {where}: {what}", code="TP-8104", next_step="tpctl checklist list")


def page(checklist: Checklist) -> list[str]:
    """The one page: 80 columns."""
    lines = [
        f"{checklist.title.upper()}  ({checklist.id})",
        *_wrapped(f"{checklist.mode}. Stop here when: {checklist.pause_point}."),
        "",
        "CONTRACT",
        *_bullets(checklist.contract),
        "FORBIDDEN",
        *_bullets(checklist.forbidden),
        "",
    ]
    for number, item in enumerate(checklist.items, 1):
        lines += _wrapped(item.text, f"{number}. [ ] ", " " * 7)
        lines += _wrapped(f"$ {item.command}", " " * 7, " " * 9)
        lines += _wrapped(f"red by {item.drill}; then runbook {item.on_fail}", " " * 7, " " * 9)
    return [*lines, "", "INSTRUMENTATION", *_bullets(checklist.instrumentation)]


def _wrapped(text: str, first: str = "", rest: str = "") -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False, break_long_words=False
    )


def _bullets(texts: tuple[str, ...]) -> list[str]:
    return [line for text in texts for line in _wrapped(text, "  - ", "    ")]
