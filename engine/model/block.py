"""One transformer block of the generator: self-attention over the cache, cross-attention to the text, FFN.

Five collectives a call, and no fewer are possible with heads and FFN cut over the mesh: each of the three outputs is
a sum over ranks, and each of the two attentions normalises its queries over the full width, which must be known
before its softmax. Self-attention's keys ride along with its queries; the text's keys are cached.

Shape legend: B batch, F frames, S tokens a frame, L = F S tokens, D model width, A width of this rank's heads,
H this rank's heads, d head width, T keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.comm.group import Group
from engine.config import ModelDims
from engine.model.attention import attend, attend_block_causal
from engine.model.kv_cache import KVCache, Span
from engine.model.linear import ColumnLinear, RowLinear, ShardedRMSNorm, empty_parameter, squares
from engine.model.rope import rotate

COLLECTIVES_PER_BLOCK = 5


@dataclass(frozen=True)
class Call:
    """What all blocks of one generator call share. `bias_T` is added to the scores of each live slot, if given."""

    kv: KVCache
    span: Span
    bias_T: Tensor | None
    block_tokens: int
    backend: str

    def attend(self, layer: int, q_BLHd: Tensor, k_BLHd: Tensor, v_BLHd: Tensor) -> Tensor:
        """Keep the new keys and values, then attend to all that this call may see. As [B, L, H, d]."""
        k_BTHd, v_BTHd = self.kv.append(layer, self.span, k_BLHd, v_BLHd)
        if self.span.recompute:
            return attend_block_causal(q_BLHd, k_BTHd, v_BTHd, self.block_tokens, backend=self.backend)
        return attend(q_BLHd, k_BTHd, v_BTHd, self.bias_T, backend=self.backend)


class LayerCall:
    """One block's part of a `Call`. Not frozen: a compiler reads all fields of a frozen one, and the call's position,
    which is never the same twice, would become part of the graph.

    Args:
        call: where this call reads and writes the cache.
        layer: the block's number.
        turns_L1P2: rotary positions of the new tokens.
        text_BTHd: the layer's text keys and values.
        ticket: what a compiled graph knows the call by (`engine.model.compiled`).
    """

    def __init__(
        self, call: Call, layer: int, turns_L1P2: Tensor, text_BTHd: tuple[Tensor, Tensor], ticket: Tensor | None = None
    ) -> None:
        self.call = call
        self.layer = layer
        self.turns_L1P2 = turns_L1P2
        self.text_BTHd = text_BTHd
        self.ticket = ticket

    def attend(self, q_BLHd: Tensor, k_BLHd: Tensor, v_BLHd: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            in_graph: Tensor = torch.ops.tpctl.attend_cached(q_BLHd, k_BLHd, v_BLHd, self.ticket)
            return in_graph
        return self.call.attend(self.layer, q_BLHd, k_BLHd, v_BLHd)


class Attention(nn.Module):
    """The projections and norms that self- and cross-attention have in common; heads cut over the mesh."""

    def __init__(self, dims: ModelDims, mesh: Group) -> None:
        super().__init__()
        self.mesh = mesh
        self.heads = dims.num_heads // mesh.size
        self.head_dim = dims.head_dim
        self.q = ColumnLinear(dims.dim, dims.dim, mesh)
        self.k = ColumnLinear(dims.dim, dims.dim, mesh)
        self.v = ColumnLinear(dims.dim, dims.dim, mesh)
        self.o = RowLinear(dims.dim, dims.dim, mesh)
        self.norm_q = ShardedRMSNorm(dims.dim, dims.eps, mesh)
        self.norm_k = ShardedRMSNorm(dims.dim, dims.eps, mesh)

    def split(self, x_BLA: Tensor) -> Tensor:
        """[B, L, A] -> [B, L, H, d]."""
        return x_BLA.view(*x_BLA.shape[:2], self.heads, self.head_dim)


class SelfAttention(Attention):
    def forward(self, x_BLD: Tensor, at: LayerCall) -> Tensor:
        q_BLA, k_BLA, v_BLA = self.q(x_BLD), self.k(x_BLD), self.v(x_BLD)
        squares_2BL = self.mesh.all_reduce(torch.stack((squares(q_BLA), squares(k_BLA))))
        q_BLHd = rotate(self.split(self.norm_q(q_BLA, squares_2BL[0])), at.turns_L1P2)
        k_BLHd = rotate(self.split(self.norm_k(k_BLA, squares_2BL[1])), at.turns_L1P2)
        y_BLHd = at.attend(q_BLHd, k_BLHd, self.split(v_BLA))
        out_BLD: Tensor = self.o(y_BLHd.flatten(2))
        return out_BLD


class CrossAttention(Attention):
    def forward(self, x_BLD: Tensor, at: LayerCall) -> Tensor:
        q_BLA = self.q(x_BLD)
        squares_BL = self.mesh.all_reduce(squares(q_BLA))
        q_BLHd = self.split(self.norm_q(q_BLA, squares_BL))
        y_BLHd = attend(q_BLHd, *at.text_BTHd, backend="sdpa")  # without a bias both backends are the same kernel
        out_BLD: Tensor = self.o(y_BLHd.flatten(2))
        return out_BLD


class Block(nn.Module):
    def __init__(self, dims: ModelDims, mesh: Group) -> None:
        super().__init__()
        self.eps = dims.eps
        self.modulation = empty_parameter(1, 6, dims.dim)
        self.self_attn = SelfAttention(dims, mesh)
        self.norm3 = AffineNorm(dims.dim, dims.eps)
        self.cross_attn = CrossAttention(dims, mesh)
        self.ffn = nn.Sequential(
            ColumnLinear(dims.dim, dims.ffn_dim, mesh), nn.GELU("tanh"), RowLinear(dims.ffn_dim, dims.dim, mesh)
        )

    def forward(self, x_BLD: Tensor, e_F6D: Tensor, at: LayerCall) -> Tensor:
        """`e_F6D`, float32: shift, scale, gate of self-attention, then of the FFN, for each frame."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.modulation.float() + e_F6D).unbind(1)
        y_BLD = self.self_attn(modulate(x_BLD, shift, scale, self.eps), at)
        x_BLD = add_gated(x_BLD, y_BLD, gate)
        x_BLD = x_BLD + self.cross_attn(self.norm3(x_BLD), at)
        y_BLD = self.ffn(modulate(x_BLD, ffn_shift, ffn_scale, self.eps))
        return add_gated(x_BLD, y_BLD, ffn_gate)


class AffineNorm(nn.Module):
    """LayerNorm with weight and bias, computed in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = empty_parameter(dim)
        self.bias = empty_parameter(dim)

    def forward(self, x_BLD: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x_BLD.float(), weight.shape, weight, bias, self.eps).type_as(x_BLD)


def modulate(x_BLD: Tensor, shift_FD: Tensor, scale_FD: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift, frame by frame, in float32; back in x's dtype."""
    normed_BFSD = by_frame(F.layer_norm(x_BLD.float(), x_BLD.shape[-1:], eps=eps), shift_FD.shape[0])
    return torch.addcmul(shift_FD[:, None], normed_BFSD, 1.0 + scale_FD[:, None]).flatten(1, 2).type_as(x_BLD)


def add_gated(x_BLD: Tensor, y_BLD: Tensor, gate_FD: Tensor) -> Tensor:
    """x + y gate, frame by frame, in float32; back in x's dtype."""
    frames = gate_FD.shape[0]
    sum_BFSD = torch.addcmul(by_frame(x_BLD.float(), frames), by_frame(y_BLD.float(), frames), gate_FD[:, None])
    return sum_BFSD.flatten(1, 2).type_as(x_BLD)


def by_frame(x_BLD: Tensor, frames: int) -> Tensor:
    return x_BLD.view(x_BLD.shape[0], frames, -1, x_BLD.shape[2])
