"""Sizes of the models, by preset."""

from __future__ import annotations

from dataclasses import dataclass

VAE_SPATIAL = 8
VAE_TEMPORAL = 4
PATCH = 2
CELL = VAE_SPATIAL * PATCH  # pixels on a side of one token


@dataclass(frozen=True)
class ModelDims:
    """Sizes of a Wan2.1 text-to-video transformer. `dim` is the model width; patches are (1, 2, 2)."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    text_dim: int
    text_len: int = 512
    freq_dim: int = 256
    in_dim: int = 16
    out_dim: int = 16
    eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


PRESETS: dict[str, ModelDims] = {
    "tiny": ModelDims(dim=64, ffn_dim=128, num_heads=4, num_layers=2, text_dim=32, text_len=32, freq_dim=64),
    # The size at which benchmarks/ measures; big enough that arithmetic dominates on one CPU core.
    "bench": ModelDims(dim=512, ffn_dim=2048, num_heads=8, num_layers=8, text_dim=4096, text_len=512),
    "wan2.1-1.3b": ModelDims(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, text_dim=4096),
    "wan2.1-14b": ModelDims(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, text_dim=4096),
}


def valid_degrees(dims: ModelDims, limit: int = 64) -> list[int]:
    """Tensor-parallel degrees that divide heads and FFN."""
    return [n for n in range(1, min(limit, dims.num_heads) + 1) if dims.num_heads % n == 0 and dims.ffn_dim % n == 0]
