"""3-D rotary positions of Wan2.1: interleaved pairs, theta 10000, the head split into time, height and width.

Angles are computed in float64, rotated in float32. Time positions are global and have no upper limit. A turn is one
complex product; torch's compiler fuses no complex numbers, so in a compiled graph it is the same product in reals.

Shape legend: B batch, L tokens (frame-major, then h, then w), H heads, d head width, P = d/2 pairs.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

THETA = 10000.0


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Pairs of the head given to time, height, width: d - 4(d//6), 2(d//6), 2(d//6) features, two a pair."""
    side = head_dim // 6
    return head_dim // 2 - 2 * side, side, side


def rotations(start_frame: int, frames: int, rows: int, columns: int, head_dim: int) -> Tensor:
    """Cosine and sine [L, 1, P, 2] (float32, CPU) for `frames` frames of rows x columns tokens."""
    grids = [
        _angles(start_frame, frames, axis_pairs(head_dim)[0])[:, None, None, :].expand(-1, rows, columns, -1),
        _angles(0, rows, axis_pairs(head_dim)[1])[None, :, None, :].expand(frames, -1, columns, -1),
        _angles(0, columns, axis_pairs(head_dim)[2])[None, None, :, :].expand(frames, rows, -1, -1),
    ]
    angles_LP = torch.cat(grids, dim=-1).reshape(frames * rows * columns, 1, head_dim // 2)
    return torch.stack((angles_LP.cos(), angles_LP.sin()), dim=-1).float()


def _angles(start: int, count: int, pairs: int) -> Tensor:
    """Position times frequency, float64 [count, pairs]."""
    with torch.device("cpu"):
        exponent = torch.arange(pairs, dtype=torch.float64) / max(pairs, 1)
        positions = torch.arange(start, start + count, dtype=torch.float64)
    return torch.outer(positions, THETA**-exponent)


def rotate(x_BLHd: Tensor, turns_L1P2: Tensor) -> Tensor:
    """Turn each interleaved pair of features by its angle. Returns a new tensor of x's dtype."""
    pairs_BLHP2 = x_BLHd.float().reshape(*x_BLHd.shape[:-1], -1, 2)
    if torch.compiler.is_compiling():
        (a_BLHP, b_BLHP), (cos_L1P, sin_L1P) = pairs_BLHP2.unbind(-1), turns_L1P2.unbind(-1)
        turned = (a_BLHP * cos_L1P - b_BLHP * sin_L1P, a_BLHP * sin_L1P + b_BLHP * cos_L1P)
        return torch.stack(turned, dim=-1).flatten(-2).type_as(x_BLHd)
    turned_BLHP = torch.view_as_complex(pairs_BLHP2) * torch.view_as_complex(turns_L1P2)
    return torch.view_as_real(turned_BLHP).flatten(-2).type_as(x_BLHd)


class RopeTables:
    """The last few tables, so that the steps of a chunk share one. Not part of the weights."""

    def __init__(self, head_dim: int, keep: int = 4) -> None:
        self._head_dim = head_dim
        self._keep = keep
        self._tables: OrderedDict[tuple[int, int, int, int, torch.device], Tensor] = OrderedDict()

    def get(self, start_frame: int, frames: int, rows: int, columns: int, device: torch.device) -> Tensor:
        """`rotations` on `device`."""
        key = (start_frame, frames, rows, columns, device)
        table_L1P2 = self._tables.get(key)
        if table_L1P2 is None:
            table_L1P2 = rotations(start_frame, frames, rows, columns, self._head_dim).to(device)
            self._tables[key] = table_L1P2
            if len(self._tables) > self._keep:
                self._tables.popitem(last=False)
        return table_L1P2
