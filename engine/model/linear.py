"""The weights of the generator: linear layers cut over the mesh, and the norm that spans the cut.

A column-parallel layer holds a slice of its output features and needs no collective. A row-parallel layer holds a
slice of its input features; each rank computes a partial sum over its slice, and one `all_reduce` completes it. The
layout is that of Megatron-LM. Parameters are created empty, in the shard's shape and without gradients: a loader
fills them, and on the meta device they cost nothing.

Shape legend: B batch, L tokens, I input features, O output features, A features of this rank's heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.comm.group import Group


def empty_parameter(*shape: int) -> nn.Parameter:
    """A parameter that a loader must fill. Inference only: it never asks for gradients."""
    return nn.Parameter(torch.empty(shape), requires_grad=False)


class Linear(nn.Module):
    """`x @ weight.T + bias` over the shapes it is given: replicated, or a slice of the output features.

    q, k and v stay three layers on purpose: one fused matmul measured no faster on a CPU core (720 tokens, dim 512:
    12.4 ms apart, 13.8 ms fused), and packing would tie the parameters' storage together.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = empty_parameter(out_features, in_features)
        self.bias = empty_parameter(out_features)

    def forward(self, x_BLI: Tensor) -> Tensor:
        return F.linear(x_BLI, self.weight, self.bias)


class ColumnLinear(Linear):
    """A slice of the output features on each rank; input whole, output sliced."""

    def __init__(self, in_features: int, out_features: int, mesh: Group) -> None:
        super().__init__(in_features, out_features // mesh.size)


class RowLinear(nn.Module):
    """A slice of the input features on each rank; input sliced, output whole. One collective a call."""

    def __init__(self, in_features: int, out_features: int, mesh: Group) -> None:
        super().__init__()
        self.mesh = mesh
        self.weight = empty_parameter(out_features, in_features // mesh.size)
        self.bias = empty_parameter(out_features)

    def forward(self, x_BLI: Tensor) -> Tensor:
        partial_BLO = F.linear(x_BLI, self.weight)
        whole_BLO = self.mesh.all_reduce(partial_BLO)
        # Every rank holds the whole bias, so it joins after the sum, once.
        return whole_BLO.add_(self.bias)


class ShardedRMSNorm(nn.Module):
    """RMSNorm over the full width of all heads, of which this rank holds a slice.

    The sum of squares must be complete before the norm applies. The caller completes it, so that the sums of q and k
    share one collective: `squares` here, `mesh.all_reduce` there, then `forward`.
    """

    def __init__(self, width: int, eps: float, mesh: Group) -> None:
        super().__init__()
        self.width = width
        self.eps = eps
        self.weight = empty_parameter(width // mesh.size)

    def forward(self, x_BLA: Tensor, squares_BL: Tensor) -> Tensor:
        """Normalise by the complete sum of squares (float32); in float32, as Wan does, then back to x's dtype."""
        scale_BL1 = torch.rsqrt(squares_BL / self.width + self.eps).unsqueeze(-1)
        return (x_BLA.float() * scale_BL1).type_as(x_BLA) * self.weight


def squares(x_BLA: Tensor) -> Tensor:
    """This rank's part of the sum of squares over the width, float32, [B, L]."""
    x_BLA = x_BLA.float()
    sums_BL: Tensor = torch.linalg.vecdot(x_BLA, x_BLA)
    return sums_BL
