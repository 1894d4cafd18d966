"""Where a name of this code stands: `engine.wire.frame:prepare` is looked up in the source, and nothing is imported.

A file and line written down would be stale after the next edit; a name is resolved when it is asked for.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import engine
import tpctl
from tpctl.books.place import BookError

PACKAGES = {"engine": Path(engine.__file__).parent, "tpctl": Path(tpctl.__file__).parent}


@dataclass(frozen=True)
class Place:
    """`file` is relative to the directory that holds the packages."""

    symbol: str
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def resolve(symbol: str) -> Place:
    """The place of `module:name` or `module:Class.name`.

    Raises:
        BookError: there is no such module, or no such name in it.
    """
    module, _, name = symbol.partition(":")
    package, *rest = module.split(".")
    path = PACKAGES.get(package, Path("nowhere")).joinpath(*rest)
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not file.is_file():
        raise BookError(f"'{symbol}': there is no module {module}", code="TP-8112", next_step="tpctl crosswalk")
    nodes: Iterable[ast.stmt] = _tree(file).body
    line = 1
    for part in name.split(".") if name else ():
        found = next((node for node in nodes if part in _names(node)), None)
        if found is None:
            raise BookError(f"'{symbol}': {module} has no '{part}'", code="TP-8112", next_step="tpctl crosswalk")
        line, nodes = found.lineno, getattr(found, "body", ())
    return Place(symbol, str(file.relative_to(PACKAGES[package].parent)), line)


@functools.cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _names(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return {node.target.id}
    return set()
