"""The source of a run: a prompt timeline in TOML, and the control that applies at each chunk.

[[event]]
at_chunk = 0
prompt = "a red fox walks over snow"
[[event]]
at_chunk = 6
prompt = "the same fox, at night"   # any of prompt, cut, bias, recompute
cut = true
bias = 0.5
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ConfigError


@dataclass(frozen=True)
class Event:
    """A change of control parameters, applied at the start of chunk `at_chunk`. None leaves a value as it is."""

    at_chunk: int
    prompt: str | None = None
    cut: bool = False
    bias: float | None = None
    recompute: bool | None = None


@dataclass(frozen=True)
class Timeline:
    events: tuple[Event, ...]

    def at(self, chunk_index: int) -> Event | None:
        """The event of this chunk, if there is one."""
        return next((event for event in self.events if event.at_chunk == chunk_index), None)

    @classmethod
    def of_prompt(cls, prompt: str) -> Timeline:
        return cls((Event(at_chunk=0, prompt=prompt),))

    @classmethod
    def from_events(cls, rows: Sequence[Mapping[str, Any]], where: str = "timeline") -> Timeline:
        """Validate rows of plain data.

        Raises:
            ConfigError: an empty timeline, an unknown key, a wrong type, events out of order, no prompt at chunk 0.
        """
        if not rows:
            raise ConfigError(f"{where} has no events", code="TP-1020", where=where, next_step="add one [[event]]")
        events = []
        for number, row in enumerate(rows):
            spot = f"{where}: event {number}"
            unknown = sorted(set(row) - {"at_chunk", "prompt", "cut", "bias", "recompute"})
            if unknown:
                raise ConfigError(f"{spot} has the unknown key '{unknown[0]}'", code="TP-1021", where=spot)
            events.append(_event(row, spot))
        for earlier, later in itertools.pairwise(events):
            if later.at_chunk <= earlier.at_chunk:
                raise ConfigError(
                    f"{where}: at_chunk must grow from event to event, but {later.at_chunk} follows {earlier.at_chunk}",
                    code="TP-1022",
                    where=where,
                )
        if events[0].at_chunk != 0 or not events[0].prompt:
            raise ConfigError(f"{where}: the first event must set a prompt at_chunk = 0", code="TP-1023", where=where)
        return cls(tuple(events))

    @classmethod
    def load(cls, path: Path) -> Timeline:
        """Read a timeline file. Raises ConfigError with the place of the mistake."""
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read the timeline {path}: {error.strerror}", code="TP-1024") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid TOML: {error}", code="TP-1025", where=str(path)) from error
        unknown = sorted(set(data) - {"event"})
        if unknown:
            raise ConfigError(f"{path} has the unknown table '{unknown[0]}'", code="TP-1021", where=str(path))
        rows = data.get("event", [])
        if not isinstance(rows, list):
            raise ConfigError(f"{path}: write [[event]], not [event]", code="TP-1021", where=str(path))
        return cls.from_events(rows, where=str(path))


def _event(row: Mapping[str, Any], spot: str) -> Event:
    at_chunk = row.get("at_chunk")
    if type(at_chunk) is not int or at_chunk < 0:
        raise ConfigError(
            f"{spot}: at_chunk must be a whole number from 0, is {at_chunk!r}", code="TP-1022", where=spot
        )
    prompt, cut, bias, recompute = (row.get(key) for key in ("prompt", "cut", "bias", "recompute"))
    if prompt is not None and (not isinstance(prompt, str) or not prompt.strip()):
        raise ConfigError(f"{spot}: prompt must be text", code="TP-1023", where=spot)
    for name, value in (("cut", cut), ("recompute", recompute)):
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"{spot}: {name} must be true or false, is {value!r}", code="TP-1026", where=spot)
    if bias is not None and (isinstance(bias, bool) or not isinstance(bias, int | float) or not 0 < bias <= 1):
        raise ConfigError(f"{spot}: bias must be in (0, 1], is {bias!r}", code="TP-1026", where=spot)
    return Event(at_chunk, prompt, bool(cut), None if bias is None else float(bias), recompute)
