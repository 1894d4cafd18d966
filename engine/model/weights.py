"""Loading this rank's part of a generator checkpoint, and telling shards apart.

The layouts are found by their names: original Wan (single file or sharded with an index), diffusers, and training
checkpoints nested under a key. Only the slices that this mesh rank holds are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.config import ModelDims
from engine.errors import WeightsError
from engine.model.checkpoint_files import open_checkpoint
from engine.model.checkpoint_names import translate
from engine.model.sharding import param_shapes, shard_dim, shard_slice

MAX_LINES = 20
_HASH_BLOCK_BYTES = 1 << 26


@dataclass(frozen=True)
class WeightsReport:
    """What was loaded. `layout` names the container and the naming, such as `safetensors/wan`."""

    fingerprint: str
    shard_bytes: int
    files: tuple[str, ...]
    layout: str


def load_shard(
    path: Path, dims: ModelDims, mesh_rank: int, mesh_size: int, *, device: torch.device | str, dtype: torch.dtype
) -> tuple[dict[str, Tensor], WeightsReport]:
    """Read the parameters of one mesh rank, by original names, in shard shape.

    Returns:
        A state dict ready for `load_state_dict(assign=True)`, and its report. Peak memory is the shard plus the
        largest single tensor.

    Raises:
        WeightsError: no such file, a corrupt file, or a checkpoint of another model; then it lists every missing,
            unexpected and misshaped tensor at once.
        GeometryError: a size that does not divide by `mesh_size`.
    """
    checkpoint = open_checkpoint(Path(path))
    naming, names = translate(checkpoint.shapes)
    if len(names) != len(checkpoint.shapes):
        raise WeightsError(
            f"{path} names {len(checkpoint.shapes) - len(names)} tensors twice, with and without a wrapper's prefix",
            code="TP-4004",
            where=str(path),
        )
    shapes = param_shapes(dims)
    _compare(Path(path), shapes, {original: checkpoint.shapes[name] for original, name in names.items()})
    state = {}
    for name, shape in shapes.items():
        dim = shard_dim(name)
        part = slice(None) if dim is None else shard_slice(shape, dim, mesh_rank, mesh_size)
        state[name] = checkpoint.read(names[name], dim, part).to(device=device, dtype=dtype)
    report = WeightsReport(
        fingerprint=fingerprint(state),
        shard_bytes=sum(tensor.nbytes for tensor in state.values()),
        files=tuple(str(file) for file in checkpoint.files),
        layout=f"{checkpoint.layout}/{naming}",
    )
    return state, report


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """128 bits (XXH3) over name, dtype, shape and bytes of each tensor, in the order of the names; 32 hex digits."""
    import xxhash

    digest = xxhash.xxh3_128()
    for name in sorted(state):
        tensor = state[name].detach()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)};".encode())
        if tensor.numel():
            # Block by block, so that hashing a shard on an accelerator needs no second copy of it on the host.
            raw = tensor.contiguous().reshape(-1).view(torch.uint8)
            for start in range(0, raw.numel(), _HASH_BLOCK_BYTES):
                digest.update(raw[start : start + _HASH_BLOCK_BYTES].cpu().numpy().data)
    return digest.hexdigest()


def _compare(path: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    missing = sorted(set(expected) - set(found))
    extra = sorted(set(found) - set(expected))
    misshaped = {
        name: {"expected": list(expected[name]), "found": list(found[name])}
        for name in sorted(set(expected) & set(found))
        if expected[name] != found[name]
    }
    if not (missing or extra or misshaped):
        return
    lines = [f"missing    {name} {expected[name]}" for name in missing]
    lines += [f"unexpected {name} {found[name]}" for name in extra]
    lines += [f"misshaped  {name}: {expected[name]} expected, {found[name]} found" for name in misshaped]
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], f"and {len(lines) - MAX_LINES + 1} more"]
    counts = f"{len(missing)} tensors missing, {len(extra)} unexpected, {len(misshaped)} misshaped"
    raise WeightsError(
        f"{path} is a checkpoint of another model: {counts}\n  " + "\n  ".join(lines),
        code="TP-4006",
        where=str(path),
        evidence={"missing": missing, "unexpected": extra, "misshaped": misshaped},
    )
