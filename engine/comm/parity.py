"""The start-up handshake: what must be equal on every rank is proved equal before any chunk.

Ranks exchange one hash first; the details travel only if the hashes differ, and then only what differs.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import struct
from collections import Counter
from collections.abc import Mapping
from importlib import metadata
from itertools import accumulate
from pathlib import Path
from typing import Any

from engine.comm.group import Group
from engine.config import EngineConfig
from engine.errors import ParityError

PROTOCOL = 2  # of this exchange; ranks of another one are refused after the first hash
DETAIL_BYTES = 2048  # of differing values that one rank sends
VALUE_CHARS, VALUE_HEAD = 96, 48  # longer values travel as their head, length and hash
RANKS_SAID, RANKS_TOLD = 8, 16  # in the sentence, in the record
NOT_SENT = "(not sent)"
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
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
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

    Equal everywhere: one all-gather of 48 bytes a rank, whatever the observation's size. A difference: once the values
    of a rank that agrees with most, then from each rank the values that are not those, `DETAIL_BYTES` at most. All
    ranks decide by what all of them received, so they make the same collectives and raise together.

    Raises:
        ParityError: on every rank of the group alike, with value by rank for each key that differs.
    """
    import torch

    seen = {key: _short(value) for key, value in observation.items()}
    own = json.dumps(seen, sort_keys=True).encode()
    digest = hashlib.sha256(json.dumps(observation, sort_keys=True).encode()).digest()
    words = torch.frombuffer(bytearray(digest + struct.pack("<qq", len(own), PROTOCOL)), dtype=torch.int64)
    gathered = torch.stack(group.all_gather(words))
    if bool((gathered[:, :4] == gathered[0, :4]).all()):
        return
    members = [int(rank) for rank in group.members]
    protocols = gathered[:, 5].tolist()
    if set(protocols) != {PROTOCOL}:
        # Ranks that compare in different ways must not begin: they would wait for each other.
        raise _error({rank: {"protocol": str(one)} for rank, one in zip(members, protocols, strict=True)}, what)
    digests = [tuple(row) for row in gathered[:, :4].tolist()]
    reference = digests.index(Counter(digests).most_common(1)[0][0])
    place = int(group.group_rank)
    lengths = [int(gathered[reference, 4]) if one == reference else 0 for one in range(group.size)]
    usual = json.loads(_concatenated(group, own if place == reference else b"", lengths, place)[reference])
    detail = _detail(usual, seen)
    sizes = torch.stack(group.all_gather(torch.tensor([len(detail)]))).flatten().tolist()
    parts = _concatenated(group, detail, sizes, place)
    details = {rank: json.loads(part) if part else {} for rank, part in zip(members, parts, strict=True)}
    raise _error(_by_rank(usual, details), what)


def _concatenated(group: Group, own: bytes, sizes: list[int], place: int) -> list[bytes]:
    """The bytes of every member, of sizes that all know. A sum, to which each rank adds its own part alone: so what
    travels is as large as what there is to say, where an all-gather would pad everybody to the longest."""
    import torch

    ends = list(accumulate(sizes))
    total = bytearray(ends[-1])
    total[ends[place] - sizes[place] : ends[place]] = own
    raw = group.all_reduce(torch.frombuffer(total, dtype=torch.uint8)).numpy().tobytes() if total else b""
    return [raw[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _short(value: str) -> str:
    """A long value by its beginning, length and hash: still unequal to any other, and small at any number of ranks."""
    if len(value) <= VALUE_CHARS:
        return value
    digest = hashlib.sha256(value.encode()).hexdigest()[:16]
    return f"{value[:VALUE_HEAD]}... ({len(value)} characters, sha256 {digest})"


def _detail(usual: Mapping[str, str], seen: Mapping[str, str]) -> bytes:
    """What is not as usual, in order of keys, as much as fits; nothing at all if all is. `upto` is where it was cut."""
    differing = [key for key in sorted(usual.keys() | seen.keys()) if usual.get(key) != seen.get(key)]
    values: dict[str, str | None] = {}
    upto, room = None, DETAIL_BYTES
    for key in differing:
        room -= len(json.dumps({key: seen.get(key)}).encode())
        if room < 0 and values:
            upto = list(values)[-1]
            break
        values[key] = seen.get(key)
    return json.dumps({"values": values, "upto": upto}).encode() if values else b""


def _by_rank(usual: Mapping[str, str], details: Mapping[int, Mapping[str, Any]]) -> dict[int, dict[str, str]]:
    """The values of each rank for the keys that anybody sent. What a rank had no room for is said to be so."""
    keys = sorted({key for detail in details.values() for key in detail.get("values", ())})
    found: dict[int, dict[str, str]] = {}
    for rank, detail in details.items():
        values, upto = detail.get("values", {}), detail.get("upto")
        row = {key: values[key] if key in values else usual.get(key) for key in keys}
        if upto is not None:
            row |= {key: NOT_SENT for key in keys if key > upto and key not in values}
        found[rank] = {key: value for key, value in row.items() if value is not None}
    return found


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
    first = next(iter(table), "")
    lines = [f"{key}: {_said(row)}" for key, row in table.items()]
    odd = minority(table[first]) if table else []
    blame = f"; the odd one out is rank {odd[0]}" if len(odd) == 1 else ""
    more = f" (and {len(lines) - 4} more)" if len(lines) > 4 else ""
    plan_differs = any(key.startswith("config.plan.") for key in table)
    compiled_apart = first.startswith(("effective.", "config.model.compile"))
    return ParityError(
        f"ranks differ in {what}: " + "; ".join(lines[:4]) + more + blame,
        fm="FM-01" if plan_differs else ("FM-50" if compiled_apart else "FM-03"),
        evidence={
            "differences": {key: {str(r): v for r, v in _told(row).items()} for key, row in table.items()},
            "minority": odd[:RANKS_TOLD],
            "ranks": len(by_rank),
        },
    )


def _said(row: Mapping[int, str]) -> str:
    """Value by rank where that can be read; of many ranks, who holds which value."""
    if len(row) <= RANKS_SAID:
        return ", ".join(f"rank {rank} = {value}" for rank, value in row.items())
    holders: dict[str, list[int]] = {}
    for rank, value in row.items():
        holders.setdefault(value, []).append(rank)
    rare_first = sorted(holders.items(), key=lambda item: len(item[1]))
    said = [
        f"{f'rank {ranks[0]}' if len(ranks) == 1 else f'{len(ranks)} ranks from rank {ranks[0]} on'} = {value}"
        for value, ranks in rare_first[:RANKS_SAID]
    ]
    left = len(rare_first) - len(said)
    return ", ".join(said) + (f", and {left} more values" if left else "")


def _told(row: Mapping[int, str]) -> Mapping[int, str]:
    """A row for the record. Of many ranks: those outside the majority, and one that stands for it."""
    odd = minority(row)
    if len(row) <= RANKS_TOLD:
        return row
    usual = next(rank for rank in row if rank not in odd)
    kept = odd[:RANKS_TOLD] if odd else list(row)[:RANKS_TOLD]
    return {rank: row[rank] for rank in sorted({usual, *kept})}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
