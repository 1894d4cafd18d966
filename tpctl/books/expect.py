"""What a command must answer: an exit code, and a value at a place in its JSON. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MISSING = object()


@dataclass(frozen=True)
class Expect:
    """`exit` lists the codes that pass. `path` is a JSON Pointer, where a step `key=value` takes the first element of
    a list of objects that has it. The value there must equal `value`, or lie within `least` and `most`."""

    exit: tuple[int, ...] = (0,)
    path: str | None = None
    value: Any = None
    least: float | None = None
    most: float | None = None

    @property
    def words(self) -> str:
        codes = " or ".join(map(str, self.exit))
        if self.path is None:
            return f"exit {codes}"
        if self.least is None and self.most is None:
            return f"exit {codes}, {self.path} = {self.value}"
        low, high = ("" if bound is None else f"{bound:g}" for bound in (self.least, self.most))
        return f"exit {codes}, {self.path} in {low}..{high}"

    def judge(self, code: int, document: Any) -> tuple[bool, str, Any]:
        """Whether it is met, why not, and the value found."""
        if code not in self.exit:
            return False, f"exit code {code}, expected {' or '.join(map(str, self.exit))}", None
        if self.path is None:
            return True, f"exit code {code}", None
        found = at(document, self.path)
        if found is MISSING:
            return False, f"nothing at {self.path}", None
        if self.least is None and self.most is None:
            good, wanted = found == self.value, repr(self.value)
        else:
            good, wanted = self._inside(found), self.words.rsplit(" in ", 1)[1]
        return good, f"{self.path} is {found!r}" + ("" if good else f", expected {wanted}"), found

    def _inside(self, found: Any) -> bool:
        if not isinstance(found, int | float) or isinstance(found, bool):
            return False
        return (self.least is None or found >= self.least) and (self.most is None or found <= self.most)


def at(document: Any, path: str) -> Any:
    """What stands at a path; MISSING where there is nothing."""
    found = document
    for raw in path.removeprefix("/").split("/"):
        step = raw.replace("~1", "/").replace("~0", "~")
        key, equals, wanted = step.partition("=")
        if isinstance(found, Mapping):
            found = found.get(step, MISSING)
        elif isinstance(found, Sequence) and not isinstance(found, str):
            if equals:
                found = next(
                    (one for one in found if isinstance(one, Mapping) and str(one.get(key)) == wanted), MISSING
                )
            else:
                found = found[int(step)] if step.isdigit() and int(step) < len(found) else MISSING
        else:
            return MISSING
    return found
