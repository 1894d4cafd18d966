"""One envelope, five renderings. Data goes to stdout, talk to stderr."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TextIO

from tpctl import __version__
from tpctl.verdict import Coverage, Finding, Verdict

SCHEMA_VERSION = 1
ONE_OF_ONE = Coverage(1, 1)


class Format(StrEnum):
    table = "table"
    wide = "wide"
    json = "json"
    jsonl = "jsonl"
    yaml = "yaml"


@dataclass(frozen=True)
class Envelope:
    """What every command answers: what is true (`data`), how sure (`verdict`, `coverage`), what `next`."""

    schema: str
    verdict: Verdict
    data: Any
    findings: tuple[Finding, ...] = ()
    coverage: Coverage = ONE_OF_ONE
    next: tuple[str, ...] = ()
    run_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": self.schema,
            "schema_version": SCHEMA_VERSION,
            "tool_version": __version__,
            "run_id": self.run_id,
            "verdict": self.verdict.value,
            "coverage": {"checked": self.coverage.checked, "expected": self.coverage.expected},
            "data": plain(self.data),
            "findings": [plain(finding.to_dict()) for finding in self.findings],
            "next": list(self.next),
        }


@dataclass(frozen=True)
class Column:
    """A column: its heading, the row's key, and whether `table` shows it too or only `wide`."""

    heading: str
    key: str
    narrow: bool = True
    right: bool = False


@dataclass(frozen=True)
class Table:
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    title: str = ""


@dataclass(frozen=True)
class Output:
    """Where and how one command speaks."""

    format: Format = Format.table
    quiet: bool = False
    no_color: bool = False
    debug: bool = False

    @classmethod
    def open(cls, format: Format, quiet: bool, no_color: bool, debug: bool) -> Output:
        """Also makes it the one that errors are reported through."""
        out = cls(format, quiet, no_color, debug)
        CURRENT.set(out)
        return out

    def say(self, line: str) -> None:
        """Talk: to stderr, unless quiet."""
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)

    def complain(self, line: str) -> None:
        """Talk that --quiet does not silence."""
        print(line, file=sys.stderr, flush=True)

    def stream(self, kind: str, row: Mapping[str, Any]) -> None:
        """With `-o jsonl`, one row at once, so that a reader sees it before the command ends."""
        if self.format is Format.jsonl:
            print(to_json({"kind": kind, **plain(row)}, indent=None), flush=True)

    def emit(self, envelope: Envelope, tables: Sequence[Table] = (), text: Iterable[str] = ()) -> None:
        """The command's data, once, to stdout. `text` are lines below the tables, for people only."""
        record = envelope.to_dict()
        if self.format is Format.json:
            print(to_json(record, indent=2))
        elif self.format is Format.jsonl:
            print(to_json({"kind": "envelope", **record}, indent=None))
        elif self.format is Format.yaml:
            sys.stdout.write("\n".join(to_yaml(record)) + "\n")
        else:
            for number, table in enumerate(tables):
                if number:
                    print()
                self._print_table(table)
            for line in text:
                print(line)
        sys.stdout.flush()

    def _print_table(self, table: Table) -> None:
        columns = [column for column in table.columns if column.narrow or self.format is Format.wide]
        cells = [[cell(row.get(column.key)) for column in columns] for row in table.rows]
        if table.title:
            print(table.title)
        if not self.pretty(sys.stdout):
            for line in plain_table([column.heading for column in columns], cells, [c.right for c in columns]):
                print(line)
            return
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text

        view = RichTable(box=None, pad_edge=False, header_style="bold")
        for column in columns:
            view.add_column(column.heading, justify="right" if column.right else "left", overflow="fold")
        for line_cells in cells:
            view.add_row(*(Text(cell, style=STYLE.get(cell, "")) for cell in line_cells))
        Console(highlight=False).print(view)

    def pretty(self, stream: TextIO) -> bool:
        """Colour and animation: on a terminal, and only if nobody asked for none."""
        return (
            stream.isatty()
            and not self.no_color
            and not os.environ.get("NO_COLOR")
            and os.environ.get("TERM", "") != "dumb"
        )


CURRENT: ContextVar[Output] = ContextVar("tpctl_output")

STYLE = {
    "PASS": "green",
    "WARN": "yellow",
    "FAIL": "bold red",
    "UNKNOWN": "bold magenta",
    "UNCHECKED": "magenta",
    "SKIP": "dim",
}


def plain(value: Any) -> Any:
    """Plain data that JSON can hold. NaN and infinity become null: the message of the finding names them."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def to_json(value: Any, indent: int | None) -> str:
    return json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False)


def to_yaml(value: Any, depth: int = 0) -> list[str]:
    """Plain data as YAML lines, in block style; scalars and keys as JSON writes them, which YAML 1.2 accepts."""
    pad = "  " * depth
    lines: list[str] = []
    if isinstance(value, dict) and value:
        for key, item in value.items():
            if isinstance(item, dict | list) and item:
                lines += [f"{pad}{to_json(key, None)}:", *to_yaml(item, depth + 1)]
            else:
                lines.append(f"{pad}{to_json(key, None)}: {to_json(item, None)}")
        return lines
    if isinstance(value, list) and value:
        for item in value:
            if isinstance(item, dict | list) and item:
                nested = to_yaml(item, depth + 1)
                lines += [f"{pad}- {nested[0].lstrip()}", *nested[1:]]
            else:
                lines.append(f"{pad}- {to_json(item, None)}")
        return lines
    return [f"{pad}{to_json(value, None)}"]


def plain_table(headings: Sequence[str], cells: Sequence[Sequence[str]], right: Sequence[bool]) -> list[str]:
    """Aligned columns two blanks apart, as wide as they need to be: nothing is ever cut off."""
    widths = [max([len(heading), *(len(row[i]) for row in cells)]) for i, heading in enumerate(headings)]
    return [
        "  ".join(
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in [list(headings), *cells]
    ]


def cell(value: Any) -> str:
    """A value as a table shows it: three digits of a float, a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    if isinstance(value, list | tuple):
        return ", ".join(cell(item) for item in value)
    return str(value)
