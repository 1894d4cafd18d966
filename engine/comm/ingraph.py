"""The one collective that a compiled graph may hold: `tpctl::all_reduce_`, an operator of ours that calls `Group`.

A graph cannot see through a process group, so a call on one would break it. An operator is opaque and does not: the
graph holds its name and the group's handle, and runs it where the forward ran it. Inside is the same `Group` method as
without a compiler, so that the refusals, the ledger and the black box see each collective as it is made, and not as a
compiler thought it would be. Each collective of a block needs the result of the one before it: none can overtake.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import library

if TYPE_CHECKING:
    from engine.comm.group import Group

NAMESPACE = "tpctl"
_groups: weakref.WeakValueDictionary[str, Group] = weakref.WeakValueDictionary()
_count = itertools.count()


def register(group: Group) -> str:
    """A handle for `group`: operators take tensors and numbers and words, not objects. It does not keep it alive."""
    handle = f"{group.label}/{next(_count)}"
    _groups[handle] = group
    return handle


def _all_reduce(tensor: torch.Tensor, handle: str) -> None:
    _groups[handle].all_reduce(tensor)


def define(schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """An operator that runs `body` on any device, without a gradient; `fake` gives the shape of its result."""
    name, bracket, rest = schema.partition("(")
    operator = f"{NAMESPACE}::{name}"
    library.define(operator, bracket + rest)
    library.impl(operator, "default", body)
    library.register_fake(operator, fake)


define("all_reduce_(Tensor(a!) tensor, str handle) -> ()", _all_reduce, lambda tensor, handle: None)
