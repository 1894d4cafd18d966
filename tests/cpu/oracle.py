"""The generator once more, written out plainly in float64, to judge the real one by.

No ring, no fused kernels, no sharding: frames are kept in a list, masks and biases are written into the score matrix.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.comm.group import Group
from engine.config import PRESETS, ModelDims
from engine.model.dit import DiT
from engine.model.kv_cache import CrossAttnCache, KVCache
from engine.model.sharding import param_shapes, shard_dim, shard_slice

TINY = PRESETS["tiny"]


def seeded_state(dims: ModelDims, seed: int = 0) -> dict[str, Tensor]:
    """Weights large enough that every part of the model shows in its output."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in param_shapes(dims).items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith(("norm_q.weight", "norm_k.weight", "norm3.weight")):
            state[name] = 1.0 + 0.1 * noise
        elif name.endswith("bias"):
            state[name] = 0.1 * noise
        elif name.endswith("modulation"):
            state[name] = noise / dims.dim**0.5
        else:
            state[name] = noise / math.prod(shape[1:]) ** 0.5
    return state


def build(dims: ModelDims, state: dict[str, Tensor], mesh: Group | None = None, **kwargs: object) -> DiT:
    """A shard of the model with its slices of `state`, the way a loader makes it."""
    mesh = mesh or Group.solo()
    with torch.device("meta"):
        dit = DiT(dims, mesh, **kwargs)
    part = {}
    for name, tensor in state.items():
        dim = shard_dim(name)
        if dim is not None:
            cut = shard_slice(tuple(tensor.shape), dim, int(mesh.group_rank), mesh.size)
            part[name] = tensor.movedim(dim, 0)[cut].movedim(0, dim).contiguous()
        else:
            part[name] = tensor
    dit.load_state_dict(part, strict=True, assign=True)
    return dit


def caches(
    dims: ModelDims, tokens: int, window: int = 6, sink: int = 0, tp: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[KVCache, CrossAttnCache]:
    heads = dims.num_heads // tp
    common = {
        "num_layers": dims.num_layers, "heads": heads, "head_dim": dims.head_dim, "dtype": dtype, "device": "cpu"
    }  # fmt: skip
    kv = KVCache(tokens_per_frame=tokens, window_frames=window, sink_frames=sink, **common)
    return kv, CrossAttnCache(text_len=dims.text_len, **common)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Oracle:
    """Same calls as `DiT.forward`; holds its own cache: for each layer, a list of (frame, keys, values)."""

    def __init__(self, dims: ModelDims, state: dict[str, Tensor], window: int, sink: int, frames_per_block: int = 3):
        self.dims = dims
        self.w = {name: tensor.double() for name, tensor in state.items()}
        self.window, self.sink, self.block = window, sink, frames_per_block
        self.reset()

    def reset(self) -> None:
        self.past: list[list[tuple[int, Tensor, Tensor]]] = [[] for _ in range(self.dims.num_layers)]

    def __call__(
        self, x: Tensor, t: Tensor, cond: Tensor, start: int, bias: float = 1.0, recompute: bool = False
    ) -> Tensor:
        x, cond = x[0].double(), cond[0].double()
        frames, channels, height, width = x.shape
        rows, columns = height // 2, width // 2
        text = torch.zeros(self.dims.text_len, self.dims.text_dim, dtype=torch.float64)
        text[: cond.shape[0]] = cond
        text = self.linear("text_embedding.2", gelu(self.linear("text_embedding.0", text)))
        half = self.dims.freq_dim // 2
        angle = t.double()[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
        wave = torch.cat([torch.cos(angle), torch.sin(angle)], 1)
        time = self.linear("time_embedding.2", silu(self.linear("time_embedding.0", wave)))
        e0 = self.linear("time_projection.1", silu(time)).reshape(frames, 6, -1)
        patches = torch.nn.functional.conv3d(
            x.transpose(0, 1)[None],
            self.w["patch_embedding.weight"],
            self.w["patch_embedding.bias"],
            stride=(1, 2, 2),
        )
        y = patches[0].flatten(1).T
        of_frame = torch.arange(frames).repeat_interleave(rows * columns)
        turns = self.turns(start, frames, rows, columns)
        for layer in range(self.dims.num_layers):
            e = (self.w[f"blocks.{layer}.modulation"] + e0)[of_frame]
            name = f"blocks.{layer}.self_attn"
            z = norm(y, self.dims.eps) * (1 + e[:, 1]) + e[:, 0]
            q, k, v = (self.heads(name, p, z) for p in "qkv")
            q, k = turn(q, turns), turn(k, turns)
            keys, values, scores = self.remember(layer, k, v, start, frames, bias, recompute)
            y = y + self.linear(f"{name}.o", softmax_attention(q, keys, values, scores)) * e[:, 2]
            name = f"blocks.{layer}.cross_attn"
            z = norm(y, self.dims.eps) * self.w[f"blocks.{layer}.norm3.weight"] + self.w[f"blocks.{layer}.norm3.bias"]
            q, k, v = self.heads(name, "q", z), self.heads(name, "k", text), self.heads(name, "v", text)
            y = y + self.linear(f"{name}.o", softmax_attention(q, k, v, torch.zeros(1, 1)))
            z = norm(y, self.dims.eps) * (1 + e[:, 4]) + e[:, 3]
            z = self.linear(f"blocks.{layer}.ffn.2", gelu(self.linear(f"blocks.{layer}.ffn.0", z)))
            y = y + z * e[:, 5]
        e = (self.w["head.modulation"] + time[:, None])[of_frame]
        out = self.linear("head.head", norm(y, self.dims.eps) * (1 + e[:, 1]) + e[:, 0])
        flow = torch.zeros(frames, channels, height, width, dtype=torch.float64)
        for token, patch in enumerate(out.reshape(-1, 2, 2, channels)):
            frame, rest = divmod(token, rows * columns)
            row, column = divmod(rest, columns)
            flow[frame, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = patch.permute(2, 0, 1)
        return flow[None]

    def remember(
        self, layer: int, k: Tensor, v: Tensor, start: int, frames: int, bias: float, recompute: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Concatenate and slice. Returns keys, values and what is added to each score, [L, T]."""
        old = [] if recompute else [entry for entry in self.past[layer] if entry[0] < start]
        new = [(start + i, a, b) for i, (a, b) in enumerate(zip(k.chunk(frames), v.chunk(frames), strict=True))]
        held = old + new
        if len(held) > self.window:
            held = held[: self.sink] + held[len(held) - (self.window - self.sink) :]
        self.past[layer] = held
        tokens = k.shape[0] // frames
        added = torch.zeros(frames, len(held), dtype=torch.float64)
        for i in range(frames):
            for j, (frame, _, _) in enumerate(held):
                if recompute and frame // self.block > i // self.block:
                    added[i, j] = -math.inf
                if not recompute and j > 0 and frame < start:
                    added[i, j] = math.log(bias)
        added = added.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
        return torch.cat([a for _, a, _ in held]), torch.cat([b for _, _, b in held]), added

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def heads(self, name: str, projection: str, x: Tensor) -> Tensor:
        y = self.linear(f"{name}.{projection}", x)
        if projection in "qk":
            y = (
                y
                / torch.sqrt((y**2).mean(1, keepdim=True) + self.dims.eps)
                * self.w[f"{name}.norm_{projection}.weight"]
            )
        return y.reshape(len(x), self.dims.num_heads, -1)

    def turns(self, start: int, frames: int, rows: int, columns: int) -> Tensor:
        """Angles [L, d/2], token by token."""
        d = self.dims.head_dim
        sizes = (d - 4 * (d // 6), 2 * (d // 6), 2 * (d // 6))
        result = []
        for frame in range(start, start + frames):
            for row in range(rows):
                for column in range(columns):
                    result.append(
                        [
                            place / 10000.0 ** (2 * i / size)
                            for place, size in zip((frame, row, column), sizes, strict=True)
                            for i in range(size // 2)
                        ]
                    )
        return torch.tensor(result, dtype=torch.float64)


def turn(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = torch.cos(angles)[:, None], torch.sin(angles)[:, None]
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, added: Tensor) -> Tensor:
    scores = torch.einsum("lhd,thd->hlt", q, k) / q.shape[-1] ** 0.5 + added
    return torch.einsum("hlt,thd->lhd", torch.softmax(scores, -1), v).flatten(1)


def norm(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(1, keepdim=True) + eps)


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))
