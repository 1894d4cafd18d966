"""What the kernel says of a living rank: its environment, its libraries, its limits. Read-only, from /proc.

Nothing here asks the rank: a rank that hangs, is stopped or lies is read like any other.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from engine.process import start_ticks
from tpctl import snapshot

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
# Libraries whose code computes, or carries tensors between ranks.
LIBRARY = re.compile(
    r"lib(torch|torch_cpu|torch_cuda|torch_python|c10|c10_cuda|cuda|cudart|cublas|cublasLt|cudnn|cudnn_\w+|nccl|gomp|iomp5"
    r"|mkl_\w+|openblas\w*|gloo|nvrtc)(-[0-9a-f]+)?\.so[.0-9]*"
)
LIMITS = {
    "Max open files": "nofile",
    "Max locked memory": "memlock",
    "Max address space": "as",
    "Max processes": "nproc",
    "Max stack size": "stack",
    "Max core file size": "core",
}
UNLIMITED = "unlimited"
PREFIXES = ("environment.", "process.", "limit.", "library.", "path.")  # of all keys that `read` gives
HEAD_BYTES = 1 << 20
NOTE_BUILD_ID = 3


class GoneError(Exception):
    """The process ended, or is another one by now."""


def read(pid: int, ticks: int) -> dict[str, Any]:
    """Key -> value of one process, named by its id and its start.

    Raises:
        GoneError: it is not there, or ended while it was read: what was read is not used.
        PermissionError: it belongs to somebody else.
    """
    try:
        _same(pid, ticks)
        environ = _environ((PROC / str(pid) / "environ").read_bytes())
        found: dict[str, Any] = {f"environment.{key}": value for key, value in snapshot.variables(environ).items()}
        found |= _status((PROC / str(pid) / "status").read_text(errors="replace"))
        found |= _limits((PROC / str(pid) / "limits").read_text())
        found["process.memory_limit_bytes"] = _memory_limit((PROC / str(pid) / "cgroup").read_text())
        found["process.program"] = os.readlink(PROC / str(pid) / "exe")
        found |= _libraries((PROC / str(pid) / "maps").read_text(errors="replace"))
        _same(pid, ticks)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise GoneError(f"process {pid} is gone") from error
    return found


def environment(pid: int, ticks: int) -> dict[str, str]:
    """All of its environment, secrets included, which must not be shown; empty where it cannot be read."""
    try:
        _same(pid, ticks)
        return _environ((PROC / str(pid) / "environ").read_bytes())
    except (OSError, GoneError):
        return {}


def _same(pid: int, ticks: int) -> None:
    if start_ticks(pid) != ticks:
        raise GoneError(f"process {pid} is another one by now")
    stat = (PROC / str(pid) / "stat").read_bytes()
    if stat[stat.rindex(b")") + 2 :][:1] in (b"Z", b"X"):
        raise GoneError(f"process {pid} has ended")


def _environ(raw: bytes) -> dict[str, str]:
    """As the process was started with; what it set for itself later is not seen here."""
    pairs = (item.partition(b"=") for item in raw.split(b"\0") if b"=" in item)
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}


def _status(text: str) -> dict[str, Any]:
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    cpus = fields["Cpus_allowed_list"].strip()
    return {
        "process.threads": int(fields["Threads"]),
        "process.cpus": cpus,
        "process.cpus_usable": sum(1 for _ in expand(cpus)),
    }


def expand(cpus: str) -> Iterator[int]:
    """`0-2,5` as 0, 1, 2, 5."""
    for part in filter(None, cpus.split(",")):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def _limits(text: str) -> dict[str, Any]:
    """Soft limits; the ones a rank runs into."""
    return {
        f"limit.{short}": line[len(name) :].split()[0]
        for line in text.splitlines()
        for name, short in LIMITS.items()
        if line.startswith(name)
    }


def _memory_limit(text: str) -> str:
    """The tightest limit of the control groups above the process. The root has none."""
    limits = []
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        base, name = (CGROUPS, "memory.max") if not controllers else (CGROUPS / "memory", "memory.limit_in_bytes")
        folder = Path(path.lstrip("/"))
        for level in (folder, *folder.parents):
            try:
                said = (base / level / name).read_text().strip()
            except OSError:
                continue  # the root, or a level that this mount does not show
            if said.isdigit() and int(said) < 1 << 62:  # version 1 writes a huge number for none
                limits.append(int(said))
    return str(min(limits)) if limits else UNLIMITED


def _libraries(text: str) -> dict[str, Any]:
    """`library.NAME` -> identity, and `path.NAME` -> where it was loaded from."""
    found: dict[str, Any] = {}
    for line in text.splitlines():
        fields = line.split(None, 5)
        if len(fields) < 6 or not fields[5].startswith("/"):
            continue
        path = fields[5].removesuffix(" (deleted)")
        name = os.path.basename(path)
        if not LIBRARY.fullmatch(name) or f"path.{name}" in found:
            continue
        found[f"path.{name}"] = path
        if path != fields[5]:
            found[f"library.{name}"] = f"replaced on disk since it was loaded; inode {fields[4]}"
        else:
            found[f"library.{name}"] = identity(Path(path), int(fields[4]))
    return found


def identity(path: Path, inode: int) -> str:
    """A library's build id, or its size and the hash of its beginning: equal on every host with the same file."""
    try:
        stat = path.stat()
        if stat.st_ino != inode:
            return f"replaced on disk since it was loaded; inode {inode}"
        return _identity(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        return f"cannot be read ({error.strerror}); inode {inode}"


@lru_cache(maxsize=256)
def _identity(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        build_id = _build_id(file)
        if build_id:
            return f"build id {build_id}"
        file.seek(0)
        return f"{size} bytes, sha256 of the first MiB {hashlib.sha256(file.read(HEAD_BYTES)).hexdigest()[:16]}"


def _build_id(file: BinaryIO) -> str:
    """The GNU build id of a 64-bit little-endian ELF file, or nothing."""
    head = file.read(64)
    if len(head) < 64 or head[:6] != b"\x7fELF\x02\x01":
        return ""
    (table,), (entry_size, entries) = struct.unpack_from("<Q", head, 32), struct.unpack_from("<HH", head, 54)
    for index in range(entries):
        file.seek(table + index * entry_size)
        entry = file.read(56)
        if len(entry) < 56 or struct.unpack_from("<I", entry)[0] != 4:  # PT_NOTE
            continue
        offset, size = struct.unpack_from("<Q", entry, 8)[0], struct.unpack_from("<Q", entry, 32)[0]
        file.seek(offset)
        found = _note(file.read(min(size, 1 << 16)))
        if found:
            return found
    return ""


def _note(notes: bytes) -> str:
    place = 0
    while place + 12 <= len(notes):
        name_size, data_size, kind = struct.unpack_from("<III", notes, place)
        data = place + 12 + (name_size + 3) // 4 * 4
        if kind == NOTE_BUILD_ID and notes[place + 12 : place + 16] == b"GNU\0":
            return notes[data : data + data_size].hex()
        place = data + (data_size + 3) // 4 * 4
    return ""
