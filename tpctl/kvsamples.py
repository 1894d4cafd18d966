"""Cache samples as a reader sees them: checked whole, then arrays.

Shape legend: C generator calls, N layers, X keys and values (2), H heads, P sampled tokens, D sampled dims, W frames of
the window, M kinds of sums (3: plain, of magnitudes, signed).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.sealed import (
    REPLAY_RANK,
    SAMPLES_ALGORITHM,
    SAMPLES_SCHEMA,
    SAMPLES_VERSION,
    SUMS,
    Kind,
    SealedError,
    read_sealed,
    samples_path,
)

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[np.float64]]

NUMBERS = ("cache_epoch", "call_id", "first_head", "total_heads", "frame_tokens", "text_len", "head_dim")


@dataclass(frozen=True)
class Samples:
    """One chunk's samples of one rank, or of the replay. `first_head` is counted over the whole model; sizes are in
    tokens and dims."""

    chunk_index: int
    cache_epoch: int
    call_id: int
    first_head: int
    total_heads: int
    frame_tokens: int
    text_len: int
    head_dim: int
    samples_CNXHPD: Array
    sums_CNXHWM: Array
    text_CNXHM: Array
    spans_C3: Array

    @property
    def calls(self) -> int:
        return int(self.samples_CNXHPD.shape[0])

    @property
    def layers(self) -> int:
        return int(self.samples_CNXHPD.shape[1])

    @property
    def heads(self) -> range:
        return range(self.first_head, self.first_head + int(self.samples_CNXHPD.shape[3]))

    def key(self) -> tuple[int, int, int]:
        """What must be equal before anything is compared."""
        return self.chunk_index, self.cache_epoch, self.call_id


def read_samples(directory: Path, chunk_index: int, job: str | None, rank: int = REPLAY_RANK) -> Samples:
    """The samples of one chunk.

    Raises:
        SealedError: missing, damaged, of another job, rank, chunk or algorithm, or of shapes that make no sense.
    """
    path = samples_path(directory, chunk_index)
    seal, body = read_sealed(path, Kind.SAMPLES)
    if job is not None and seal.job != job:
        raise _refuse(path, f"is of another job ({seal.job}, not {job})")
    if (seal.rank, seal.chunk_index) != (rank, chunk_index):
        raise _refuse(path, f"says it is of rank {seal.rank}, chunk {seal.chunk_index}")
    facts, arrays = _open(path, body)
    for name, wanted in (
        ("schema", SAMPLES_SCHEMA),
        ("schema_version", str(SAMPLES_VERSION)),
        ("algorithm", SAMPLES_ALGORITHM),
    ):
        if facts.get(name) != wanted:
            raise _refuse(path, f"has {name} {facts.get(name)!r}; this tool reads {wanted!r}")
    try:
        numbers = {name: int(facts[name]) for name in NUMBERS}
        found = Samples(
            chunk_index=chunk_index,
            **numbers,
            samples_CNXHPD=arrays["samples"],
            sums_CNXHWM=arrays["sums"],
            text_CNXHM=arrays["text_sums"],
            spans_C3=arrays["spans"],
        )
    except (KeyError, ValueError) as error:
        raise _refuse(path, f"lacks {error}") from error
    _check_shapes(path, found)
    return found


def _open(path: Path, body: bytes) -> tuple[Mapping[str, str], dict[str, Array]]:
    """Metadata and arrays of a safetensors file."""
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = {name: array.astype(np.float64) for name, array in load(body).items()}
        length = int.from_bytes(body[:8], "little")
        facts = json.loads(body[8 : 8 + length]).get("__metadata__", {})
    except (SafetensorError, ValueError) as error:
        raise _refuse(path, f"holds no tensors: {error}") from error
    return facts, arrays


def _check_shapes(path: Path, found: Samples) -> None:
    shape = found.samples_CNXHPD.shape
    sizes = (found.frame_tokens, found.text_len, found.head_dim)
    if len(shape) != 6 or shape[2] != 2 or min(*shape, *sizes) < 1 or not 0 <= found.first_head < found.total_heads:
        raise _refuse(path, f"holds samples of shape {list(shape)}")
    window = found.sums_CNXHWM.shape[4] if found.sums_CNXHWM.ndim == 6 else -1
    for name, array, wanted in (
        ("sums", found.sums_CNXHWM, (*shape[:4], window, len(SUMS))),
        ("text_sums", found.text_CNXHM, (*shape[:4], len(SUMS))),
        ("spans", found.spans_C3, (shape[0], 3)),
    ):
        if array.shape != wanted:
            raise _refuse(path, f"holds {name} of shape {list(array.shape)}")


def _refuse(path: Path, what: str) -> SealedError:
    return SealedError(f"{path} {what}", where=str(path))
