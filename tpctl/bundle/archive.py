"""The file of a bundle: a gzipped tar of plain files in a fixed order, the manifest first.

Writing: for its owner alone, whole or not at all. Reading trusts nothing: no link, no device, no path that leaves the
archive, nothing twice, bounds on everything before room is made for it, every file against the manifest's sha256.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tpctl.bundle.manifest import NAME, SCHEMA, SCHEMA_VERSION, Manifest
from tpctl.errors import BundleError

MODE = 0o600
MAX_MEMBERS = 8192
MAX_MEMBER_BYTES = 128 << 20
MAX_TOTAL_BYTES = 1 << 30
MAX_NAME = 200
COMPONENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read: its manifest, and each file's bytes by name. `problems` are files that do not fit it."""

    path: Path
    manifest: Mapping[str, Any]
    files: Mapping[str, bytes]
    problems: tuple[str, ...] = ()


def write(manifest: Manifest, path: Path) -> int:
    """Write a bundle; returns its size in bytes.

    Raises:
        BundleError: there is something at `path` already, or it cannot be written.
    """
    if path.exists() or path.is_symlink():
        raise BundleError(f"{path} exists, and is left as it is", code="TP-8002", next_step="another --out FILE")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, MODE)
        with os.fdopen(descriptor, "wb") as stream:
            _pack(manifest, stream)
            size = stream.tell()
        os.link(temporary, path)  # fails where somebody else was faster
    except OSError as error:
        raise BundleError(
            f"cannot write {path}: {error.strerror}", code="TP-8003", next_step="another --out FILE"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return size


def _pack(manifest: Manifest, stream: Any) -> None:
    files = {NAME: (json.dumps(manifest.to_dict(), indent=1, allow_nan=False) + "\n").encode()}
    files |= {item.name: item.raw for item in sorted(manifest.items, key=lambda i: i.name) if item.raw is not None}
    with (
        gzip.GzipFile("", "wb", fileobj=stream, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name, raw in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(raw), MODE
            archive.addfile(member, io.BytesIO(raw))


def is_bundle(path: Path) -> bool:
    """Whether its first file is a bundle's manifest, of whatever version."""
    try:
        with contextlib.closing(_members(path)) as members:
            name, raw = next(members)
            return name == NAME and json.loads(raw).get("schema") == SCHEMA
    except (BundleError, StopIteration, ValueError, AttributeError, RecursionError):
        return False


def read(path: Path) -> Bundle:
    """All of a bundle.

    Raises:
        BundleError: it is none, is damaged, of a newer version, or holds what a bundle never holds.
    """
    manifest: dict[str, Any] | None = None
    files: dict[str, bytes] = {}
    with contextlib.closing(_members(path)) as members:
        for name, raw in members:
            if manifest is None:
                manifest = _manifest(path, name, raw)
            else:
                files[name] = raw
    if manifest is None:
        raise _refuse(path, "is empty")
    return Bundle(path, manifest, files, tuple(_misfits(manifest, files)))


@contextlib.contextmanager
def extracted(bundle: Bundle) -> Iterator[Path]:
    """A directory, for this user alone, with the files of a bundle while the body runs."""
    with TemporaryDirectory(prefix="tpctl-bundle-") as folder:
        root = Path(folder)
        for name, raw in bundle.files.items():
            target = root / name
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, MODE)
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(raw)
        yield root


class Bounded(io.RawIOBase):
    """What comes out of the gzip stream, up to a limit: a few bytes may unpack to any number."""

    def __init__(self, path: Path, source: gzip.GzipFile, limit_bytes: int) -> None:
        self._path, self._source, self._left = path, source, limit_bytes

    def read(self, size: int = -1) -> bytes:
        data = self._source.read(min(size, self._left + 1) if size >= 0 else self._left + 1)
        self._left -= len(data)
        if self._left < 0:
            raise _refuse(self._path, f"unpacks to more than {MAX_TOTAL_BYTES >> 20} MiB", "TP-8012")
        return data


def _members(path: Path) -> Generator[tuple[str, bytes], None, None]:
    """Names and bytes, one after the other. Raises BundleError."""
    seen: set[str] = set()
    try:
        if not path.is_file():
            raise _refuse(path, "is not a file")
        with gzip.open(path) as packed:
            source: Any = Bounded(path, packed, MAX_TOTAL_BYTES)
            with tarfile.open(fileobj=source, mode="r|") as archive:
                for member in archive:
                    if len(seen) >= MAX_MEMBERS:
                        raise _refuse(path, f"holds more than {MAX_MEMBERS} files", "TP-8012")
                    _check_member(path, member, seen)
                    stream = archive.extractfile(member)
                    raw = stream.read(member.size) if stream is not None else b""
                    if len(raw) != member.size:
                        raise _refuse(path, f"is cut short in {member.name}")
                    yield member.name, raw
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError, OverflowError) as error:
        raise _refuse(path, f"is damaged, or no gzipped tar: {error}") from error
    except OSError as error:
        raise _refuse(path, f"cannot be read: {error.strerror or error}") from error


def _check_member(path: Path, member: tarfile.TarInfo, seen: set[str]) -> None:
    """Before anything of it is read."""
    name = member.name
    shown = repr(name[:MAX_NAME])
    if not member.isreg() or member.issparse():
        raise _refuse(path, f"holds {shown}, which is not a plain file", "TP-8011")
    if len(name) > MAX_NAME or not all(COMPONENT.fullmatch(part) for part in name.split("/")):
        raise _refuse(path, f"holds {shown}, a name that no bundle has", "TP-8011")
    if name in seen or any(name.startswith(f"{other}/") or other.startswith(f"{name}/") for other in seen):
        raise _refuse(path, f"holds {shown} twice, or as a file and a directory", "TP-8011")
    if not 0 <= member.size <= MAX_MEMBER_BYTES:
        raise _refuse(path, f"holds {shown} with {member.size} bytes, more than a file may have", "TP-8012")
    seen.add(name)


def _manifest(path: Path, name: str, raw: bytes) -> dict[str, Any]:
    try:
        data = json.loads(raw) if name == NAME else None
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise _refuse(path, f"is no bundle: it does not begin with a {NAME}")
    if data.get("schema_version") != SCHEMA_VERSION:
        raise BundleError(
            f"{path} is a bundle of version {data.get('schema_version')!r}; this tool reads {SCHEMA_VERSION}",
            code="TP-8013",
            next_step="use the newer tpctl of the two hosts",
        )
    rows = data.get("items")
    if not isinstance(rows, list) or not all(
        isinstance(one, dict) and isinstance(one.get("name"), str) for one in rows
    ):
        raise _refuse(path, "has a damaged manifest: no list of items")
    runs = data.get("runs")
    if not isinstance(runs, list) or not all(map(_is_run, runs)):
        raise _refuse(path, "has a damaged manifest: no list of runs")
    return data


def _is_run(one: object) -> bool:
    """A label becomes part of a path."""
    label, lives = (one.get("label"), one.get("lives")) if isinstance(one, dict) else (None, None)
    if not isinstance(label, str) or COMPONENT.fullmatch(label) is None or not isinstance(lives, dict):
        return False
    return all(rank.isdecimal() and len(rank) < 7 and isinstance(life, str) for rank, life in lives.items())


def _misfits(manifest: Mapping[str, Any], files: Mapping[str, bytes]) -> Iterator[str]:
    told = {item["name"]: item.get("sha256") for item in manifest["items"]}
    for name, raw in files.items():
        if name not in told:
            yield f"{name} is not in the manifest"
        elif told[name] != hashlib.sha256(raw).hexdigest():
            yield f"{name} is not what the manifest says: it was altered"
    for name, digest in told.items():
        if digest is not None and name not in files:
            yield f"{name} is in the manifest and not in the bundle"


def _refuse(path: Path, what: str, code: str = "TP-8010") -> BundleError:
    return BundleError(f"{path} {what}", code=code, where=str(path))
