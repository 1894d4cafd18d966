"""What goes wrong with a compiler: on one rank, on all of them, or in the middle of the stream.

The first kind is planted before anything is loaded: what is broken is how the generator will be compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from engine.comm.group import Group
from engine.faults.places import in_phase_b
from engine.faults.scene import Method, Scene, wrap
from engine.model import attention


@dataclass(frozen=True)
class Early:
    """Planted before the handshake; on the victim, or on every rank."""

    act: Callable[[], None]
    everyone: bool = False


def break_graphs() -> None:
    """Collectives are hidden from the compiler, the way one hides what it cannot trace: each breaks the graph."""
    wrap(Group, "all_reduce", torch.compiler.disable)


def other_backend() -> None:
    """`auto` finds on this rank what it finds on no other."""

    def make(resolve: Method) -> Method:
        def altered(*arguments: Any) -> tuple[str, str]:
            resolve(*arguments)
            return "flex", "auto: its kernel was compiled here and agrees with sdpa"

        return altered

    wrap(attention, "resolve_backend", make)


def forget(scene: Scene) -> None:
    """The compiler forgets what it made: the next call has it made again."""
    torch.compiler.reset()


compiles_anew = in_phase_b(forget)

EARLY: Mapping[str, Early] = MappingProxyType(
    {
        "C-02": Early(break_graphs, everyone=True),
        "C-03": Early(break_graphs),
        "C-04": Early(other_backend),
    }
)
