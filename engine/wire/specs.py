"""Descriptions of the tensors in a payload, and where each of them lies.

A spec is `[key, index, [shape], dtype]` in the meta. Tensors are packed in the order of `(key, index)`, each at the
next multiple of 16 bytes, so that the receiver can use them in place; the gaps are zero and count as payload.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.wire.problem import Problem

ALIGNMENT = 16
MAX_DIMS = 8
MAX_BYTES = 1 << 62

# The dtypes of the contract, with bytes an element.
ITEM_BYTES: dict[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4, "int64": 8, "int32": 4, "uint8": 1}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor on the wire. `dtype` is a key of `ITEM_BYTES`."""

    key: str
    index: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def to_row(self) -> list[Any]:
        return [self.key, self.index, list(self.shape), self.dtype]


def layout(specs: Sequence[TensorSpec]) -> tuple[list[int], int]:
    """The offset of each tensor, and the size of the whole payload, in bytes."""
    offsets, end = [], 0
    for spec in specs:
        offsets.append(end)
        end += -(-spec.nbytes // ALIGNMENT) * ALIGNMENT
    return offsets, end


def read_specs(rows: Any) -> list[TensorSpec] | Problem:
    """Rows from the wire as specs, or the first thing wrong with them. Allocates nothing but the list."""
    if type(rows) is not list:
        return Problem("tensor_specs", "not a list", "15")
    specs: list[TensorSpec] = []
    for number, row in enumerate(rows):
        spot = f"tensor_specs[{number}]"
        if type(row) is not list or len(row) != 4:
            return Problem(spot, "not [key, index, shape, dtype]", "15")
        key, index, shape, dtype = row
        if type(key) is not str or type(index) is not int or index < 0:
            return Problem(spot, "key must be text and index a whole number from 0", "15")
        if type(dtype) is not str or dtype not in ITEM_BYTES:
            return Problem(
                spot,
                f"tensor '{key}' has the unsupported dtype {dtype!r}; known: {', '.join(ITEM_BYTES)}",
                "19",
                "FM-07",
            )
        if type(shape) is not list or len(shape) > MAX_DIMS or any(type(n) is not int or n < 1 for n in shape):
            return Problem(spot, f"tensor '{key}' has a shape that is not up to {MAX_DIMS} sizes above 0", "15")
        spec = TensorSpec(key, index, tuple(shape), dtype)
        if spec.nbytes > MAX_BYTES:
            return Problem(spot, f"tensor '{key}' is impossibly large", "15")
        if specs and (key, index) <= (specs[-1].key, specs[-1].index):
            return Problem(spot, f"('{key}', {index}) is repeated or out of order", "15")
        specs.append(spec)
    return specs
