"""The start-up handshake: what must be equal on every rank is proved equal before any chunk.

Ranks exchange one hash first; the details travel only if the hashes differ.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections import Counter
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from engine.comm.group import Group
from engine.config import EngineConfig
from engine.errors import ParityError

LIBRARIES = ("torch", "numpy", "safetensors")
# Variables that change arithmetic, threads or the order of collectives.
ENVIRONMENT = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CUBLAS_WORKSPACE_CONFIG",
    "NCCL_ALGO",
    "NCCL_PROTO",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "NVIDIA_TF32_OVERRIDE",
    "ATEN_CPU_CAPABILITY",
)


def launch_observation(config: EngineConfig) -> dict[str, str]:
    """What this rank would run with, known before any model loads."""
    seen = {
        f"config.{section}.{key}": json.dumps(value)
        for section, values in config.to_dict().items()
        for key, value in values.items()
    }
    seen |= {f"library.{name}": _version(name) for name in LIBRARIES}
    seen |= {f"environment.{name}": os.environ.get(name, "") for name in ENVIRONMENT}
    seen["python"] = ".".join(platform.python_version_tuple()[:2])
    seen["code.engine"] = code_identity()
    return seen


def shape_observation(config: EngineConfig, mesh_size: int, effective: Mapping[str, str]) -> dict[str, str]:
    """The shape handshake: geometry, dtype, model sizes, mesh size, and what `auto` became."""
    dims = config.dims
    seen = {f"effective.{key}": value for key, value in effective.items()}
    seen |= {f"dims.{key}": str(value) for key, value in vars(dims).items()}
    seen["mesh.size"] = str(mesh_size)
    seen["geometry.latent_hw"] = str(config.latent_hw)
    seen["geometry.tokens_per_frame"] = str(config.tokens_per_frame)
    return seen


def check(group: Group, observation: Mapping[str, str], what: str) -> None:
    """Compare `observation` over the group.

    Raises:
        ParityError: on every rank of the group alike, with value by rank for each key that differs.
    """
    import torch

    text = json.dumps(observation, sort_keys=True).encode()
    words = torch.frombuffer(
        bytearray(hashlib.sha256(text).digest() + len(text).to_bytes(8, "little")), dtype=torch.int64
    )
    gathered = torch.stack(group.all_gather(words))
    if bool((gathered[:, :4] == gathered[0, :4]).all()):
        return
    longest = int(gathered[:, 4].max())
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    by_rank = {}
    for rank, size, raw in zip(group.members, gathered[:, 4].tolist(), group.all_gather(padded), strict=True):
        by_rank[int(rank)] = json.loads(raw[: int(size)].numpy().tobytes())
    raise _error(by_rank, what)


def differences(by_rank: Mapping[int, Mapping[str, str]]) -> dict[str, dict[int, str]]:
    """Keys whose values are not all equal, with the value of each rank; a missing key reads '(missing)'."""
    keys = sorted({key for seen in by_rank.values() for key in seen})
    table = {key: {rank: seen.get(key, "(missing)") for rank, seen in by_rank.items()} for key in keys}
    return {key: row for key, row in table.items() if len(set(row.values())) > 1}


def minority(row: Mapping[int, str]) -> list[int]:
    """Ranks outside a strict majority; empty when there is none (two ranks differ: no culprit)."""
    value, votes = Counter(row.values()).most_common(1)[0]
    return [rank for rank, seen in row.items() if seen != value] if votes * 2 > len(row) else []


def code_identity() -> str:
    """sha256 over the engine's own sources."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _error(by_rank: Mapping[int, Mapping[str, str]], what: str) -> ParityError:
    table = differences(by_rank)
    first = next(iter(table))
    lines = [
        f"{key}: " + ", ".join(f"rank {rank} = {value}" for rank, value in row.items()) for key, row in table.items()
    ]
    odd = minority(table[first])
    blame = f"; the odd one out is rank {odd[0]}" if len(odd) == 1 else ""
    more = f" (and {len(lines) - 4} more)" if len(lines) > 4 else ""
    plan_differs = any(key.startswith("config.plan.") for key in table)
    return ParityError(
        f"ranks differ in {what}: " + "; ".join(lines[:4]) + more + blame,
        fm="FM-01" if plan_differs else ("FM-50" if first.startswith("effective.") else "FM-03"),
        evidence={"differences": {key: {str(r): v for r, v in row.items()} for key, row in table.items()}},
    )


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "(missing)"
