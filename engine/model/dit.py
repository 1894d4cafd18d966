"""The generator: Wan2.1's text-to-video transformer, causal over chunks, cut over the mesh.

Reads top to bottom: patches, text (only where its cache is empty), time, blocks, head. Parameter names are those of
the original checkpoints. The semantics are section 8 of the contract; the layers follow Wan2.1, the cache follows the
causal models distilled from it.

Shape legend: B batch, F frames, C latent channels, h w latent size, S = (h/2)(w/2) tokens a frame, L = F S tokens,
D model width, N layers, T text tokens, P = d/2 pairs of a head.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.comm.group import Group
from engine.config import PATCH, ModelDims, valid_degrees
from engine.errors import GeometryError
from engine.model.block import COLLECTIVES_PER_BLOCK, Block, Call, CrossAttention, LayerCall, modulate
from engine.model.compiled import AsWritten, Blocks
from engine.model.kv_cache import CrossAttnCache, KVCache
from engine.model.linear import Linear, empty_parameter, squares
from engine.model.rope import RopeTables


class DiT(nn.Module):
    """One mesh rank's shard of the generator.

    Build it under `torch.device(...)` ("meta" included) and the wanted default dtype; parameters have the shard's
    shape and are left empty for a loader to fill.

    Args:
        dims: sizes of the whole model.
        mesh: the ranks that share it; every tensor-parallel collective runs on this group.
        backend: "sdpa" or "flex", the effective one (`attention.resolve_backend`).
        frames_per_block: frames that see each other in a recompute call.
        run: how blocks run; as they are written, if not given.

    Raises:
        GeometryError: heads or FFN do not divide by the mesh, or the head width is odd.
    """

    def __init__(
        self,
        dims: ModelDims,
        mesh: Group,
        *,
        backend: str = "sdpa",
        frames_per_block: int = 3,
        run: Blocks | None = None,
    ) -> None:
        super().__init__()
        degrees = valid_degrees(dims, mesh.size)
        if mesh.size not in degrees or dims.dim % dims.num_heads or dims.head_dim % 2 or frames_per_block < 1:
            raise GeometryError(
                f"a model of width {dims.dim} with {dims.num_heads} heads and FFN width {dims.ffn_dim} cannot be cut "
                f"over {mesh.size} ranks; of at most {mesh.size}, these can be: {', '.join(map(str, degrees))}",
                code="TP-1103",
                evidence={"tp": mesh.size, "valid": degrees},
            )
        self.dims = dims
        self.mesh = mesh
        self.backend = backend
        self.frames_per_block = frames_per_block
        self.run = run if run is not None else AsWritten()
        self.patch_embedding = PatchEmbedding(dims)
        self.text_embedding = nn.Sequential(
            Linear(dims.text_dim, dims.dim), nn.GELU("tanh"), Linear(dims.dim, dims.dim)
        )
        self.time_embedding = nn.Sequential(Linear(dims.freq_dim, dims.dim), nn.SiLU(), Linear(dims.dim, dims.dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(dims.dim, 6 * dims.dim))
        self.blocks = nn.ModuleList(Block(dims, mesh) for _ in range(dims.num_layers))
        self.head = Head(dims)
        self._rope = RopeTables(dims.head_dim)

    def collectives_per_call(self, *, rebuilds_text: bool = False) -> int:
        """Collectives of one `forward`: five a block, and one more, for all layers, where the text cache is empty."""
        return COLLECTIVES_PER_BLOCK * len(self.blocks) + int(rebuilds_text)

    def forward(
        self,
        x_BFCHW: Tensor,
        timestep_F: Tensor,
        conditioning_BLD: Tensor,
        *,
        kv: KVCache,
        cross: CrossAttnCache,
        start_frame: int,
        bias: float = 1.0,
        recompute: bool = False,
    ) -> Tensor:
        """One generator call: the flow at x, of its shape and dtype.

        Args:
            x_BFCHW: noisy latents, or clean context frames for a recompute.
            timestep_F: one timestep a frame, 0..1000.
            conditioning_BLD: text embeddings, padded here with zeros to `dims.text_len`; read only where `cross` is
                not valid.
            kv: this rank's cache; see `KVCache.span` for the places a call may have.
            start_frame: global position of the first frame.
            bias: b of the contract, 0 < b <= 1; 1 is off. A recompute call ignores it.
            recompute: rewrite the cache from these frames, block-causal.

        Raises:
            GeometryError: shapes that do not fit the model or its caches. Raised before the first collective.
            TripwireError: a place in the cache that no plan leads to. Raised before the first collective.
        """
        rows, columns = self._check(x_BFCHW, timestep_F, conditioning_BLD, kv, cross)
        frames = x_BFCHW.shape[1]
        dtype, device = self.patch_embedding.weight.dtype, x_BFCHW.device
        span = kv.span(start_frame, frames, recompute=recompute)

        if not cross.valid:
            text_BTD = self._embed_text(conditioning_BLD.to(dtype))
            squares_NBT = self.mesh.all_reduce(self._project_text(text_BTD, cross))
            self._norm_text(squares_NBT, cross)
            cross.valid = True

        turns_L1P2 = self._rope.get(start_frame, frames, rows, columns, device)
        call = Call(
            kv=kv,
            span=span,
            bias_T=kv.bias_for(span, bias, dtype),
            block_tokens=self.frames_per_block * rows * columns,
            backend=self.backend,
        )
        time_FD = self.time_embedding(sinusoid(timestep_F, self.dims.freq_dim).to(dtype))
        e_F6D = self.time_projection(time_FD).view(frames, 6, -1).float()
        tokens_BLD = self.patch_embedding(x_BFCHW.to(dtype))
        with self.run.opened(call, len(self.blocks)) as tickets:
            for layer, block in enumerate(self.blocks):
                text_BTHd = cross.k_NBTHd[layer], cross.v_NBTHd[layer]
                at = LayerCall(call, layer, turns_L1P2, text_BTHd, tickets[layer])
                assert isinstance(block, Block)
                tokens_BLD = self.run(block, tokens_BLD, e_F6D, at)
        patches_BLO = self.head(tokens_BLD, time_FD)
        return unpatchify(patches_BLO, frames, rows, columns).type_as(x_BFCHW)

    def _embed_text(self, conditioning_BLD: Tensor) -> Tensor:
        """Pad with zeros to the text length the model was trained with, then embed; the padding is not masked."""
        padding = self.dims.text_len - conditioning_BLD.shape[1]
        text_BTD: Tensor = self.text_embedding(F.pad(conditioning_BLD, (0, 0, 0, padding)))
        return text_BTD

    def _project_text(self, text_BTD: Tensor, cross: CrossAttnCache) -> Tensor:
        """Fill the text cache with raw keys and values; this rank's sums of squares of all layers' keys, [N, B, T]."""
        sums = []
        for layer, attention in enumerate(self._cross_attentions()):
            k_BTA = attention.k(text_BTD)
            cross.k_NBTHd[layer].copy_(attention.split(k_BTA))
            cross.v_NBTHd[layer].copy_(attention.split(attention.v(text_BTD)))
            sums.append(squares(k_BTA))
        return torch.stack(sums)

    def _norm_text(self, squares_NBT: Tensor, cross: CrossAttnCache) -> None:
        for layer, attention in enumerate(self._cross_attentions()):
            k_BTA = attention.norm_k(cross.k_NBTHd[layer].flatten(2), squares_NBT[layer])
            cross.k_NBTHd[layer].copy_(attention.split(k_BTA))

    def _cross_attentions(self) -> Iterator[CrossAttention]:
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block.cross_attn

    def _check(
        self, x_BFCHW: Tensor, timestep_F: Tensor, conditioning_BLD: Tensor, kv: KVCache, cross: CrossAttnCache
    ) -> tuple[int, int]:
        """Rows and columns of tokens in a frame."""
        dims = self.dims
        batch = x_BFCHW.shape[0]
        if x_BFCHW.ndim != 5 or x_BFCHW.shape[2] != dims.in_dim or x_BFCHW.shape[3] % PATCH or x_BFCHW.shape[4] % PATCH:
            raise GeometryError(
                f"latents must be [1, F, {dims.in_dim}, even, even], are {list(x_BFCHW.shape)}", code="TP-1106"
            )
        rows, columns = x_BFCHW.shape[3] // PATCH, x_BFCHW.shape[4] // PATCH
        if rows * columns != kv.tokens_per_frame:
            raise GeometryError(
                f"a frame has {rows} x {columns} tokens, but the KV cache was made for {kv.tokens_per_frame}",
                code="TP-1106",
            )
        if tuple(timestep_F.shape) != (x_BFCHW.shape[1],):
            raise GeometryError(
                f"one timestep a frame is needed: {x_BFCHW.shape[1]} frames, timesteps {list(timestep_F.shape)}",
                code="TP-1106",
            )
        length = conditioning_BLD.shape[1] if conditioning_BLD.ndim == 3 else -1
        if tuple(conditioning_BLD.shape) != (batch, length, dims.text_dim) or not 0 < length <= dims.text_len:
            raise GeometryError(
                f"conditioning_embeds must be [{batch}, 1..{dims.text_len}, {dims.text_dim}], "
                f"are {list(conditioning_BLD.shape)}",
                code="TP-1106",
            )
        if cross.text_len != dims.text_len:
            raise GeometryError(
                f"the text cache holds {cross.text_len} tokens, the model needs {dims.text_len}", code="TP-1106"
            )
        heads = dims.num_heads // self.mesh.size
        for name, held, want in (
            ("KV cache", kv.shape, (dims.num_layers, batch, heads, dims.head_dim)),
            ("text cache", cross.shape, (dims.num_layers, batch, heads, dims.head_dim)),
        ):
            if held != want:
                raise GeometryError(
                    f"the {name} has (layers, batch, heads, head width) {held}, the model needs {want}", code="TP-1106"
                )
        return rows, columns


class PatchEmbedding(nn.Module):
    """The original's Conv3d of kernel and stride (1, 2, 2), as one matmul over flattened patches."""

    def __init__(self, dims: ModelDims) -> None:
        super().__init__()
        self.weight = empty_parameter(dims.dim, dims.in_dim, 1, PATCH, PATCH)
        self.bias = empty_parameter(dims.dim)

    def forward(self, x_BFCHW: Tensor) -> Tensor:
        """[B, F, C, h, w] -> [B, L, D], frame-major, then rows, then columns."""
        batch, frames, channels, height, width = x_BFCHW.shape
        patches_BFCYpXq = x_BFCHW.reshape(batch, frames, channels, height // PATCH, PATCH, width // PATCH, PATCH)
        patches_BLI = patches_BFCYpXq.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)
        return F.linear(patches_BLI, self.weight.flatten(1), self.bias)


class Head(nn.Module):
    """Modulated norm and the projection from tokens to patches."""

    def __init__(self, dims: ModelDims) -> None:
        super().__init__()
        self.eps = dims.eps
        self.modulation = empty_parameter(1, 2, dims.dim)
        self.head = Linear(dims.dim, PATCH * PATCH * dims.out_dim)

    def forward(self, x_BLD: Tensor, time_FD: Tensor) -> Tensor:
        shift_FD, scale_FD = (self.modulation.float() + time_FD.float().unsqueeze(1)).unbind(1)
        patches_BLO: Tensor = self.head(modulate(x_BLD, shift_FD, scale_FD, self.eps))
        return patches_BLO


def sinusoid(timestep_F: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of the timestep at `width`/2 frequencies; float64 [F, width]."""
    half = width // 2
    frequencies = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=timestep_F.device) / half)
    angles_FP = torch.outer(timestep_F.double(), frequencies)
    return torch.cat((angles_FP.cos(), angles_FP.sin()), dim=1)


def unpatchify(patches_BLO: Tensor, frames: int, rows: int, columns: int) -> Tensor:
    """[B, L, 2 2 C] -> [B, F, C, h, w]; channels vary fastest within a patch."""
    patches_BFYXpqC = patches_BLO.view(-1, frames, rows, columns, PATCH, PATCH, patches_BLO.shape[2] // PATCH**2)
    return patches_BFYXpqC.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
