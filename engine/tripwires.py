"""Tripwires: what ranks observed, compared. Pure: observations in, findings out; the gathering is done by Stage 1.

With three or more ranks a strict majority names the odd ones; with two, the difference is named and nobody is blamed.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import xxhash

from engine.comm.parity import minority
from engine.errors import CallCountError, TripwireError
from engine.plan import ChunkPlan

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


def raise_first(
    findings: Sequence[Finding | None],
    ids: Mapping[str, int],
    *,
    here: str = "",
    evidence: Mapping[str, object] | None = None,
) -> None:
    """Raise for the first finding, carrying all of them as evidence; `here` is what this rank alone has to say of it.

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
        first.sentence() + (f"; here: {here}" if here else ""),
        fm=first.fm,
        ids=ids,
        evidence={
            "check": first.check,
            "field": first.field,
            "by_rank": {str(rank): value for rank, value in first.by_rank.items()},
            "minority": list(first.minority),
            "all": [finding.sentence() for finding in found],
            **(evidence or {}),
        },
        next_step="tpctl triage RUN_DIR",
    )


def digest(tensors: Mapping[str, torch.Tensor | None], scalars: Sequence[object] = ()) -> int:
    """Signed 64-bit digest over scalars and every byte of every tensor, in key order.

    Tensors on the CPU are hashed with xxh3. Those on a device are reduced there to one word (`device_word`), so a
    digest costs no copy of the payload; all ranks hold a tensor on the same kind of device, so like meets like.
    """
    import torch

    hasher = xxhash.xxh3_64()
    hasher.update(repr(tuple(scalars)).encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        if tensor is None:
            hasher.update(f"{key}=null".encode())
            continue
        flat = tensor.detach().contiguous().reshape(-1)
        hasher.update(f"{key}:{tuple(tensor.shape)}:{tensor.dtype}".encode())
        if flat.device.type == "cpu":
            hasher.update(flat.view(torch.uint8).numpy().data)
        else:
            hasher.update(str(device_word(flat)).encode())
    return signed(hasher.intdigest())


def device_word(flat: torch.Tensor) -> int:
    """One 64-bit word over every byte of a flat tensor, computed where the tensor is.

    Bytes are weighted by odd multipliers that depend on the position, and summed modulo 2^64: any single altered byte
    changes the sum, and so does swapping two different ones.
    """
    import torch

    raw = flat.view(torch.uint8).to(torch.int64)
    place = torch.arange(raw.numel(), dtype=torch.int64, device=raw.device)
    weight = (place * -7046029254386353131) ^ (place >> 7) | 1
    return int(((raw + 1) * weight).sum().item())


def finite(tensor: torch.Tensor) -> torch.Tensor:
    """Whether no element is NaN or infinite, as a bool scalar where the tensor is; nothing is waited for.

    NaN goes through `aminmax`, and an infinity is one of its ends: one pass instead of the mask of `isfinite`, which
    costs 15 times as much on the CPU.
    """
    import torch

    return torch.isfinite(torch.stack(torch.aminmax(tensor))).all()


def signed(word: int) -> int:
    """An unsigned 64-bit word as int64, for collectives."""
    return word - (1 << 64) if word >= 1 << 63 else word


LIFECYCLE = (
    "cache_epoch",
    "call_id",
    "chunk_index",
    "current_start_frame",
    "do_kv_recompute",
    "num_denoise_steps",
    "kv_cache_attention_bias",
    "global_end_index",
    "local_end_index",
)


def lifecycle(plan: ChunkPlan, call_id: int, global_end_index: int, local_end_index: int) -> list[int]:
    """The KV lifecycle digest's fields in the order of `LIFECYCLE`, each as int64; the bias by its float64 bits."""
    (bias_bits,) = struct.unpack("<q", struct.pack("<d", plan.kv_cache_attention_bias))
    return [
        plan.cache_epoch,
        call_id,
        plan.chunk_index,
        plan.current_start_frame,
        int(plan.do_kv_recompute),
        plan.num_denoise_steps,
        bias_bits,
        global_end_index,
        local_end_index,
    ]


def compare_lifecycle(rows: Sequence[Sequence[int]], ranks: Sequence[int]) -> list[Finding | None]:
    """A finding for each lifecycle field that differs; `rows` holds one list over ranks for each field."""
    return [
        compare("KV lifecycle digest", name, values, ranks, "FM-32")
        for name, values in zip(LIFECYCLE, rows, strict=True)
    ]


class ShardGuard:
    """A shard's weights against their baseline of load time, parameter group by parameter group.

    A group is a block, or a top-level module. `check` returns the number of the first group that changed, or -1.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        self._groups: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in parameters.items():
            parts = name.split(".")
            group = ".".join(parts[:2]) if parts[0] == "blocks" else parts[0]
            self._groups.setdefault(group, {})[name] = tensor
        self.names = tuple(sorted(self._groups))
        self.baseline = [digest(self._groups[name]) for name in self.names]

    @property
    def word(self) -> int:
        """The whole baseline in one int64: equal baselines of different shards mean a rank loaded another's."""
        return signed(xxhash.xxh3_64_intdigest(repr(self.baseline).encode()))

    def check(self) -> int:
        for number, name in enumerate(self.names):
            if digest(self._groups[name]) != self.baseline[number]:
                return number
        return -1
