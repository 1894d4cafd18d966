"""Checkpoint files as a table of tensors that are read slice by slice.

A safetensors file is mapped anew for each tensor: pages of a mapping count as this process' memory until the mapping
goes, so that one long-lived mapping would let a rank's peak grow to the whole checkpoint.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import WeightsError

SAFETENSORS_INDEX = "diffusion_pytorch_model.safetensors.index.json"
SAFETENSORS_FILE = "diffusion_pytorch_model.safetensors"
# The keys under which training code nests a generator, best first: the averaged weights are the ones to serve.
NESTED_KEYS = ("generator_ema", "generator", "model", "state_dict")
# Reading the table of contents of a .pt takes tens of milliseconds, so it is not mapped anew for every tensor.
REMAP_BYTES = 256 << 20
EXPECTED = (
    f"expected a .safetensors file, a .pt file, or a directory with {SAFETENSORS_FILE} or {SAFETENSORS_INDEX} "
    "and the files it names"
)


class Checkpoint(ABC):
    """Tensors on disk, by the names in the file. `shapes` are full shapes; `layout` names the container."""

    layout: str
    files: tuple[Path, ...]
    shapes: dict[str, tuple[int, ...]]

    @abstractmethod
    def read(self, name: str, dim: int | None, part: slice) -> Tensor:
        """A copy in memory of one tensor, or of the slice `part` of its dimension `dim` (0 or 1)."""


def open_checkpoint(path: Path) -> Checkpoint:
    """Find the files behind `path` and read their tables of contents, no tensor yet.

    Raises:
        WeightsError: nothing there, files of the index missing, or a file that is truncated or not what its name says.
    """
    if path.is_dir():
        path = _pick(path)
    elif not path.exists():
        raise WeightsError(f"there is no checkpoint at {path}: {EXPECTED}", code="TP-4002", where=str(path))
    if path.name.endswith(".index.json"):
        return _SafetensorsCheckpoint(_index_files(path))
    if path.suffix == ".safetensors":
        return _SafetensorsCheckpoint((path,))
    if path.suffix in {".pt", ".pth", ".bin", ".ckpt"}:
        return _TorchCheckpoint(path)
    raise WeightsError(f"{path} is not a checkpoint by its name: {EXPECTED}", code="TP-4003", where=str(path))


def _pick(directory: Path) -> Path:
    """The one checkpoint in a directory, or in its `transformer` directory as diffusers pipelines lay it out."""
    for place in (directory, directory / "transformer"):
        for name in (SAFETENSORS_INDEX, SAFETENSORS_FILE):
            if (place / name).is_file():
                return place / name
        for pattern in ("*.safetensors.index.json", "*.safetensors", "*.pt"):
            found = sorted(place.glob(pattern))
            if len(found) == 1:
                return found[0]
            if found:
                raise WeightsError(
                    f"{place} holds {len(found)} {pattern} files: name one of them",
                    code="TP-4003",
                    where=str(place),
                    evidence={"files": [str(file) for file in found]},
                )
    raise WeightsError(f"no checkpoint in {directory}: {EXPECTED}", code="TP-4002", where=str(directory))


def _index_files(index: Path) -> tuple[Path, ...]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} is not a safetensors index: {error}", code="TP-4004", where=str(index)) from error
    # An index is data: it may name its neighbours and nothing else.
    foreign = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if foreign:
        raise WeightsError(f"{index} names files outside its directory: {foreign[0]}", code="TP-4004", where=str(index))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise WeightsError(
            f"{index} names {len(names)} files, of which {len(missing)} are missing: {', '.join(missing[:5])}",
            code="TP-4002",
            where=str(index),
            evidence={"missing_files": missing},
        )
    return tuple(index.parent / name for name in names)


class _SafetensorsCheckpoint(Checkpoint):
    layout = "safetensors"

    def __init__(self, files: tuple[Path, ...]) -> None:
        self.files = files
        self.shapes = {}
        self._file_of: dict[str, Path] = {}
        for file in files:
            with _opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                    if name in self._file_of:
                        raise WeightsError(
                            f"{name} is in both {self._file_of[name].name} and {file.name}",
                            code="TP-4004",
                            where=str(file),
                        )
                    self._file_of[name] = file
                    self.shapes[name] = tuple(tensors.get_slice(name).get_shape())

    def read(self, name: str, dim: int | None, part: slice) -> Tensor:
        with _opened(self._file_of[name]) as tensors:
            if dim is None:
                tensor: Tensor = tensors.get_tensor(name)
            else:
                view = tensors.get_slice(name)
                tensor = view[part] if dim == 0 else view[:, part]
            # A copy, never a view: a view would keep the whole file mapped.
            return tensor.clone(memory_format=torch.contiguous_format)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise _corrupt(file, error) from error


class _TorchCheckpoint(Checkpoint):
    """A .pt file, mapped, so that only pages of slices that are read are loaded; mapped anew every `REMAP_BYTES`."""

    def __init__(self, path: Path) -> None:
        self.files = (path,)
        self._map()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._state.items()}

    def read(self, name: str, dim: int | None, part: slice) -> Tensor:
        tensor = self._state[name]
        self._touched_bytes += tensor.nbytes
        if dim is not None:
            tensor = tensor.narrow(dim, part.start, part.stop - part.start)
        copy = tensor.detach().clone(memory_format=torch.contiguous_format)
        del tensor  # the last view of the old mapping, if it is to go
        if self._touched_bytes >= REMAP_BYTES:
            self._map()
        return copy

    def _map(self) -> None:
        import pickle  # for the name of the error alone; weights_only refuses everything but tensors

        self._touched_bytes = 0
        self._state: dict[str, Tensor] = {}
        (path,) = self.files
        try:
            loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            raise _corrupt(path, error) from error
        self._state, self.layout = _unnest(loaded, path)


def _unnest(loaded: Any, path: Path) -> tuple[dict[str, Tensor], str]:
    nesting = "pt"
    for _ in range(3):
        if not isinstance(loaded, Mapping):
            break
        state = {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
        if state:
            return state, nesting
        key = next((key for key in NESTED_KEYS if key in loaded), None)
        if key is None:
            break
        loaded, nesting = loaded[key], f"{nesting}:{key}"
    raise WeightsError(
        f"{path} holds no tensors at its top or under any of {', '.join(NESTED_KEYS)}", code="TP-4003", where=str(path)
    )


def _corrupt(file: Path, error: Exception) -> WeightsError:
    size = file.stat().st_size if file.exists() else 0
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return WeightsError(
        f"{file} ({size} bytes) is truncated, corrupt or of another format: {first_line}",
        code="TP-4005",
        where=str(file),
        evidence={"size_bytes": size, "cause": str(error)},
        next_step="copy the file again and compare its size with the original",
    )
