"""A snapshot of this host as plain data, and its TOML file. Never imports torch, never fails for want of a tool."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import engine
from engine.config import Loaded, dotted_keys
from engine.errors import ConfigError
from tpctl import __version__
from tpctl.errors import SnapshotError, record_of

SCHEMA = "tpctl.snapshot"
SCHEMA_VERSION = 2
PACKAGES = ("torch", "transformers", "diffusers", "numpy", "safetensors", "tokenizers", "xxhash", "av", "pillow")
# What version 1 recorded of the environment; it did not say so itself.
VARIABLES_1 = (
    "CUDA_DEVICE_ORDER",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_VISIBLE_DEVICES",
    "GLOO_SOCKET_IFNAME",
    "HF_HUB_OFFLINE",
    "LD_PRELOAD",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "PYTHONHASHSEED",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TOKENIZERS_PARALLELISM",
    "TORCH_LOGS",
)
PREFIXES_1 = ("NCCL_", "TORCH_NCCL_", "TORCH_DISTRIBUTED_")
# Everything else in the environment may be private and is left out.
VARIABLES = (
    *VARIABLES_1,
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "DNNL_MAX_CPU_ISA",
    "GOMP_CPU_AFFINITY",
    "KMP_AFFINITY",
    "LD_LIBRARY_PATH",
    "MKL_CBWR",
    "OMP_PLACES",
    "OMP_PROC_BIND",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)
PREFIXES = PREFIXES_1
# A snapshot without these is damaged: two of them, cut off at the same place, would otherwise agree on what is left.
REQUIRED: dict[str, tuple[str, ...]] = {
    "host": ("name", "kernel", "machine", "cpu"),
    "python": ("version", "minor"),
    "versions": ("torch",),
    "code": ("engine_sha256", "version"),
    "gpu": ("count",),
    "threads": ("omp", "mkl"),
    "environment": (),
}
SEAL = "seal"
MAX_BYTES = 4 << 20
TOOL_TIMEOUT_S = 10.0


def take(loaded: Loaded | ConfigError | None, environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """This host now: section -> key -> value. A bad configuration is recorded, not raised."""
    environ = os.environ if environ is None else environ
    snapshot: dict[str, Any] = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "tool_version": __version__,
        "collected": {"variables": sorted(VARIABLES), "prefixes": list(PREFIXES)},
        "host": host(),
        "python": {
            "version": platform.python_version(),
            "minor": ".".join(platform.python_version_tuple()[:2]),
            "implementation": platform.python_implementation(),
        },
        "versions": versions(),
        "code": {"engine_sha256": engine_fingerprint(), "commit": commit(), "version": __version__},
        "gpu": gpus(),
        "threads": threads(environ),
        "environment": variables(environ),
    }
    if isinstance(loaded, ConfigError):
        snapshot["config_error"] = {key: str(value) for key, value in record_of(loaded).items() if value is not None}
    elif loaded is not None:
        config = loaded.config.to_dict()
        snapshot["config"] = {f"{section}.{key}": v for section, values in config.items() for key, v in values.items()}
        snapshot["config"]["parity_key"] = loaded.config.parity_key()
    return snapshot


def host() -> dict[str, Any]:
    import psutil

    return {
        "name": platform.node(),
        "kernel": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cpu": cpu_model(),
        "cpus": psutil.cpu_count() or 0,
        "cpus_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count() or 0,
        "memory_bytes": int(psutil.virtual_memory().total),
    }


def cpu_model() -> str:
    """The processor's name, as the kernel tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine() or "unknown"


def versions() -> dict[str, str]:
    """Installed versions by distribution metadata: nothing is imported."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def engine_fingerprint() -> str:
    """sha256 over the engine's source files, by relative path: equal code, equal text."""
    folder = Path(engine.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def commit() -> str:
    """The commit of the checkout that this code runs from, or "unknown"."""
    out = _tool(["git", "-C", str(Path(engine.__file__).parent), "rev-parse", "HEAD"])
    return out.strip() if out else "unknown"


def gpus() -> dict[str, Any]:
    """What nvidia-smi says; no tool and no GPU are the same answer: a count of 0."""
    out = _tool(["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"])
    rows = [[part.strip() for part in line.split(",")] for line in (out or "").splitlines() if line.count(",") >= 2]
    if not rows:
        return {"count": 0}
    return {
        "count": len(rows),
        "names": [row[0] for row in rows],
        "driver": rows[0][1],
        "memory": [row[2] for row in rows],
    }


def threads(environ: Mapping[str, str]) -> dict[str, Any]:
    return {"omp": environ.get("OMP_NUM_THREADS", "unset"), "mkl": environ.get("MKL_NUM_THREADS", "unset")}


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment by allow-list."""
    ours = {"TPCTL_" + dotted.replace(".", "_").upper() for dotted in dotted_keys()}
    return {
        name: value
        for name, value in sorted(environ.items())
        if name in VARIABLES or name in ours or name.startswith(PREFIXES)
    }


def save(snapshot: Mapping[str, Any], path: Path) -> None:
    """Write the TOML file, sealed. Raises OSError with the path if it cannot be written."""
    path.write_text(sealed(snapshot), encoding="utf-8")


def sealed(snapshot: Mapping[str, Any]) -> str:
    """The text of the TOML file."""
    import tomli_w

    content = {key: value for key, value in snapshot.items() if key != SEAL}
    return tomli_w.dumps(content | {SEAL: {"sha256": seal(content)}})


def seal(snapshot: Mapping[str, Any]) -> str:
    """sha256 over everything but the seal itself: a file that was cut or altered does not match it."""
    content = {key: value for key, value in snapshot.items() if key != SEAL}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def read(path: Path) -> dict[str, Any]:
    """Read a snapshot file of this schema version or of an older one.

    Raises:
        SnapshotError: missing, not TOML, not a snapshot, damaged, or of a newer schema than this tool knows.
    """
    try:
        if not path.is_file() and path.exists():
            raise SnapshotError(f"{path} is not a file", code="TP-7202")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise SnapshotError(f"{path} is larger than any snapshot: over {MAX_BYTES} bytes", code="TP-7203")
        data = tomllib.loads(raw.decode("utf-8"))
    except OSError as error:
        raise SnapshotError(f"cannot read the snapshot {path}: {error.strerror}", code="TP-7202") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SnapshotError(f"{path} is not valid TOML: {error}", code="TP-7203") from error
    if data.get("schema") != SCHEMA:
        raise SnapshotError(
            f"{path} is not a snapshot: its schema is {data.get('schema')!r}, not {SCHEMA!r}", code="TP-7204"
        )
    version = data.get("schema_version")
    if type(version) is not int or version < 1:
        raise SnapshotError(f"{path} has no usable schema_version: {version!r}", code="TP-7204")
    if version > SCHEMA_VERSION:
        raise SnapshotError(
            f"{path} has snapshot schema {version}, and this tpctl reads up to {SCHEMA_VERSION}",
            code="TP-7205",
            evidence={"written_by": data.get("tool_version"), "this": __version__},
            next_step="use the newer tpctl of the two hosts, or take the snapshot again with this one",
        )
    _require_whole(data, path)
    return data


def _require_whole(data: Mapping[str, Any], path: Path) -> None:
    for section, keys in REQUIRED.items():
        values = data.get(section)
        if not isinstance(values, Mapping):
            raise SnapshotError(f"{path} is damaged: it has no section [{section}]", code="TP-7203")
        missing = [key for key in keys if key not in values]
        if missing:
            raise SnapshotError(f"{path} is damaged: [{section}] lacks {', '.join(missing)}", code="TP-7203")
    if data["schema_version"] >= 2:
        written = data.get(SEAL)
        if not isinstance(written, Mapping) or written.get("sha256") != seal(data):
            raise SnapshotError(
                f"{path} is damaged or was edited: its seal does not match what it says",
                code="TP-7203",
                next_step="take the snapshot again: tpctl env --save FILE",
            )


def sees(snapshot: Mapping[str, Any], key: str) -> bool:
    """Whether this snapshot would have recorded `key`, had it been there. Version 1 knew fewer variables."""
    section, _, name = key.partition(".")
    if section == "config":
        return section in snapshot
    if section != "environment":
        return True
    collected = snapshot.get("collected", {"variables": VARIABLES_1, "prefixes": PREFIXES_1})
    ours = name.startswith("TPCTL_")
    return bool(ours or name in collected["variables"] or name.startswith(tuple(collected["prefixes"])))


def flatten(snapshot: Mapping[str, Any]) -> dict[str, Any]:
    """Sections as `section.key`; the file's own header words are left out."""
    return {
        f"{section}.{key}": value
        for section, values in snapshot.items()
        if isinstance(values, Mapping) and section not in (SEAL, "collected")
        for key, value in values.items()
    }


def _tool(command: list[str]) -> str | None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TOOL_TIMEOUT_S, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


if __name__ == "__main__":  # what `tpctl parity-check` starts, once a planned rank, in the ranks' own environment
    from engine.config import load

    of_all = load([("file", Path(sys.argv[1]))], None)
    print(json.dumps(take(replace(of_all, config=of_all.config.of_rank(int(os.environ["RANK"]))))))
