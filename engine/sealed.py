"""Sealed files: one recorded frame or one chunk's cache samples, read whole or refused.

    preamble   magic, version, kind, job, rank, chunk, length of the body, BLAKE2b of all that and the body
    body       a frame as it was sent (`kind` FRAME), or a safetensors file (`kind` SAMPLES)

Written under another name and moved in whole, readable by its owner alone. A reader learns which job a file belongs to
before it believes anything in it, and a flipped bit, a cut end or a foreign file is told from a wrong value. Free of
torch, for tools.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import struct
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from engine.errors import EngineError

MAGIC, VERSION = b"TPCTLSEA", 1
DIGEST_BYTES = 16
# What a SAMPLES body says about itself. The algorithm names what is sampled and where: samples under different names
# are never compared. The kinds of sums stand in the order in which they are kept.
SAMPLES_SCHEMA, SAMPLES_VERSION, SAMPLES_ALGORITHM = "tpctl.kv-samples", 1, "kv-samples-1"
SUMS = ("sum", "abs-sum", "signed-sum")
REPLAY_RANK = -1  # samples that no rank made, but a replay on one process

_WORDS = struct.Struct("<8sII32siqq")
PREAMBLE_BYTES = _WORDS.size + DIGEST_BYTES


class Kind(IntEnum):
    FRAME = 1
    SAMPLES = 2


class SealedError(EngineError):
    """A file that is no sealed file, of another kind or version, cut short or altered."""

    code = "TP-6221"
    next_step = "tpctl kv-audit RUN_DIR"


@dataclass(frozen=True)
class Seal:
    """Whose file this is. `job` is the name all ranks of one launch share, 32 ASCII characters at most."""

    kind: Kind
    job: str
    rank: int
    chunk_index: int


def frames_dir(run_dir: Path) -> Path:
    return run_dir / "frames"


def samples_dir(run_dir: Path, rank: int) -> Path:
    return run_dir / "ranks" / f"rank{rank}.kv"


def frame_path(run_dir: Path, chunk_index: int) -> Path:
    return frames_dir(run_dir) / f"chunk_{chunk_index:05d}.frame"


def samples_path(directory: Path, chunk_index: int) -> Path:
    return directory / f"chunk_{chunk_index:05d}.samples"


def chunks_in(directory: Path, ending: str) -> list[int]:
    """Chunk numbers of the files in a directory, ascending; nothing where there is no directory."""
    names = (path.name.removeprefix("chunk_").removesuffix(ending) for path in directory.glob(f"chunk_*{ending}"))
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def make_empty(directory: Path, ending: str) -> None:
    """A directory for the owner alone, without files of an earlier job.

    Raises:
        OSError: whatever the file system says.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for chunk_index in chunks_in(directory, ending):
        (directory / f"chunk_{chunk_index:05d}{ending}").unlink(missing_ok=True)


def write_sealed(path: Path, seal: Seal, body: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: the disk refuses; nothing is left of the attempt.
    """
    words = _pack(seal, len(body))
    temporary = path.with_name(f".{path.name}.partial")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        try:
            for part in (words + _digest(words, body), body):
                view = memoryview(part)
                while view:
                    view = view[os.write(fd, view) :]
        finally:
            os.close(fd)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def read_sealed(path: Path, kind: Kind) -> tuple[Seal, bytes]:
    """The seal and the body.

    Raises:
        SealedError: anything but a whole, unaltered file of this kind and version.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a pipe might wait for ever
        with open(fd, "rb") as stream:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise _refuse(path, "is not a plain file")
            head = stream.read(PREAMBLE_BYTES)
            if len(head) < PREAMBLE_BYTES:
                raise _refuse(path, f"is cut short: {len(head)} of at least {PREAMBLE_BYTES} bytes")
            magic, version, word, job, rank, chunk_index, length = _WORDS.unpack(head[: _WORDS.size])
            if magic != MAGIC:
                raise _refuse(path, "is no recording of this engine")
            if version != VERSION:
                raise _refuse(path, f"has version {version} of sealed files; this tool reads {VERSION}")
            if length != found.st_size - PREAMBLE_BYTES:
                raise _refuse(path, f"holds {found.st_size - PREAMBLE_BYTES} bytes, {length} were written")
            body = stream.read()
    except OSError as error:
        raise _refuse(path, f"cannot be read: {error.strerror}") from error
    if _digest(head[: _WORDS.size], body) != head[_WORDS.size :]:
        raise _refuse(path, "was altered since it was written")
    if word != kind:
        raise _refuse(path, f"is a recording of kind {word}, not {kind.name}")
    return Seal(kind, job.rstrip(b"\0").decode("ascii", "replace"), rank, chunk_index), body


def _pack(seal: Seal, length: int) -> bytes:
    return _WORDS.pack(MAGIC, VERSION, seal.kind, seal.job.encode(), seal.rank, seal.chunk_index, length)


def _digest(words: bytes, body: bytes) -> bytes:
    hashed = hashlib.blake2b(words, digest_size=DIGEST_BYTES)
    hashed.update(body)
    return hashed.digest()


def _refuse(path: Path, what: str) -> SealedError:
    return SealedError(f"{path} {what}", where=str(path))
