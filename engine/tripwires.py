"""Tripwires: what ranks observed, compared. Pure: observations in, findings out; the gathering is done by Stage 1.

With three or more ranks a strict majority names the odd ones; with two, the difference is named and nobody is blamed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import xxhash

from engine.comm.parity import minority
from engine.errors import CallCountError, TripwireError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Finding:
    """One difference: which check, which field, value by mesh rank, and whom a majority convicts (may be empty)."""

    check: str
    field: str
    by_rank: Mapping[int, int]
    minority: tuple[int, ...]
    fm: str

    def sentence(self) -> str:
        values = ", ".join(f"rank {rank} = {value}" for rank, value in self.by_rank.items())
        blame = f"; the odd one out: rank {', '.join(map(str, self.minority))}" if self.minority else ""
        return f"{self.check}: {self.field} differs: {values}{blame}"


def compare(check: str, field: str, values: Sequence[int], ranks: Sequence[int], fm: str) -> Finding | None:
    """None if all values are equal."""
    if len(set(values)) <= 1:
        return None
    by_rank = dict(zip(ranks, values, strict=True))
    odd = minority({rank: str(value) for rank, value in by_rank.items()})
    return Finding(check, field, by_rank, tuple(odd), fm)


def raise_first(findings: Sequence[Finding | None], ids: Mapping[str, int]) -> None:
    """Raise for the first finding, carrying all of them as evidence.

    Raises:
        CallCountError: the first finding is a call count.
        TripwireError: any other.
    """
    found = [finding for finding in findings if finding is not None]
    if not found:
        return
    first = found[0]
    kind = CallCountError if first.fm == "FM-02" else TripwireError
    raise kind(
        first.sentence(),
        fm=first.fm,
        ids=ids,
        evidence={
            "check": first.check,
            "field": first.field,
            "by_rank": {str(rank): value for rank, value in first.by_rank.items()},
            "minority": list(first.minority),
            "all": [finding.sentence() for finding in found],
        },
        next_step="tpctl triage RUN_DIR",
    )


def digest(tensors: Mapping[str, torch.Tensor | None], scalars: Sequence[object] = ()) -> int:
    """Signed 64-bit xxh3 over scalars and every byte of every tensor, in key order. CUDA tensors are brought over."""
    import torch

    hasher = xxhash.xxh3_64()
    hasher.update(repr(tuple(scalars)).encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        if tensor is None:
            hasher.update(f"{key}=null".encode())
            continue
        flat = tensor.detach().contiguous().cpu()
        hasher.update(f"{key}:{tuple(flat.shape)}:{flat.dtype}".encode())
        hasher.update(flat.reshape(-1).view(torch.uint8).numpy().data)
    value: int = hasher.intdigest()
    return value - (1 << 64) if value >= 1 << 63 else value
