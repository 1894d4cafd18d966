"""Which tensors the generator has, and which part of each a mesh rank holds.

Names and shapes are those of the original Wan2.1 text-to-video checkpoints. Sharding is Megatron's: a pair of linears
is split by output columns first and by input rows second, so that one sum over the mesh joins the pair. Everything
that belongs to a head (q, k, v, their biases, the weights of the q/k norms) goes with the head.
"""

from __future__ import annotations

import re

from engine.config import PATCH, ModelDims
from engine.errors import GeometryError

# A linear weight is [out, in]: dim 0 splits its outputs, dim 1 its inputs.
_SPLIT_OUTPUT = re.compile(
    r"blocks\.\d+\.(?:(?:self_attn|cross_attn)\.(?:[qkv]\.(?:weight|bias)|norm_[qk]\.weight)|ffn\.0\.(?:weight|bias))"
)
# The biases of these are added once, after the sum over the mesh: every rank holds them whole.
_SPLIT_INPUT = re.compile(r"blocks\.\d+\.(?:(?:self_attn|cross_attn)\.o|ffn\.2)\.weight")


def param_shapes(dims: ModelDims) -> dict[str, tuple[int, ...]]:
    """Every parameter of the generator with its full, unsharded shape, in the order of the original model."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out_features: int, in_features: int) -> None:
        shapes[f"{name}.weight"] = (out_features, in_features)
        shapes[f"{name}.bias"] = (out_features,)

    shapes["patch_embedding.weight"] = (dims.dim, dims.in_dim, 1, PATCH, PATCH)
    shapes["patch_embedding.bias"] = (dims.dim,)
    linear("text_embedding.0", dims.dim, dims.text_dim)
    linear("text_embedding.2", dims.dim, dims.dim)
    linear("time_embedding.0", dims.dim, dims.freq_dim)
    linear("time_embedding.2", dims.dim, dims.dim)
    linear("time_projection.1", 6 * dims.dim, dims.dim)
    for layer in range(dims.num_layers):
        block = f"blocks.{layer}"
        shapes[f"{block}.modulation"] = (1, 6, dims.dim)
        for attention in ("self_attn", "cross_attn"):
            for projection in "qkvo":
                linear(f"{block}.{attention}.{projection}", dims.dim, dims.dim)
            shapes[f"{block}.{attention}.norm_q.weight"] = (dims.dim,)
            shapes[f"{block}.{attention}.norm_k.weight"] = (dims.dim,)
        shapes[f"{block}.norm3.weight"] = (dims.dim,)
        shapes[f"{block}.norm3.bias"] = (dims.dim,)
        linear(f"{block}.ffn.0", dims.ffn_dim, dims.dim)
        linear(f"{block}.ffn.2", dims.dim, dims.ffn_dim)
    linear("head.head", PATCH * PATCH * dims.out_dim, dims.dim)
    shapes["head.modulation"] = (1, 2, dims.dim)
    return shapes


def shard_dim(name: str) -> int | None:
    """The dimension along which the mesh splits this parameter; None where every rank holds all of it."""
    if _SPLIT_OUTPUT.fullmatch(name):
        return 0
    if _SPLIT_INPUT.fullmatch(name):
        return 1
    return None


def shard_slice(shape: tuple[int, ...], dim: int, mesh_rank: int, mesh_size: int) -> slice:
    """The part of dimension `dim` that belongs to `mesh_rank`.

    Raises:
        GeometryError: the size does not divide by `mesh_size`, or there is no such mesh rank.
    """
    size = shape[dim]
    if not 0 <= mesh_rank < mesh_size:
        raise GeometryError(f"mesh rank {mesh_rank} is not in a mesh of {mesh_size}", code="TP-1105")
    if size % mesh_size:
        raise GeometryError(f"dimension {dim} of {shape} does not divide by {mesh_size} mesh ranks", code="TP-1105")
    part = size // mesh_size
    return slice(mesh_rank * part, (mesh_rank + 1) * part)


def shard_shape(name: str, shape: tuple[int, ...], mesh_size: int) -> tuple[int, ...]:
    """The shape of this parameter on any one mesh rank."""
    dim = shard_dim(name)
    if dim is None:
        return shape
    part = shard_slice(shape, dim, 0, mesh_size)
    return (*shape[:dim], part.stop - part.start, *shape[dim + 1 :])
