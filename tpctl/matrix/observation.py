"""What a case left behind in its run directory, read once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from tpctl.launch.local import Outcome
    from tpctl.matrix.case import Case


@dataclass(frozen=True)
class Observation:
    """A finished case. `refused` is the error record if the configuration was turned down before launch."""

    case: Case
    run_dir: Path
    outcome: Outcome | None = None
    reports: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    refused: Mapping[str, Any] | None = None
    launch_error: Mapping[str, Any] | None = None
    reference: Observation | None = None
    other: Observation | None = None

    @property
    def leader(self) -> Mapping[str, Any]:
        """Rank 0's report, or an empty one."""
        return self.reports.get(0, {})

    @cached_property
    def latents(self) -> dict[str, np.ndarray[Any, Any]] | None:
        """float32 [1, F, C, h, w] by chunk, or None if there is no readable file."""
        return read_tensors(self.run_dir / "latents.safetensors")

    @cached_property
    def pixels(self) -> dict[str, np.ndarray[Any, Any]] | None:
        """uint8 [T, H, W, 3] by chunk, or None if there is no readable file."""
        return read_tensors(self.run_dir / "pixels.safetensors")


def read_tensors(path: Path) -> dict[str, np.ndarray[Any, Any]] | None:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors: dict[str, np.ndarray[Any, Any]] = load_file(path)
    except (OSError, SafetensorError):
        return None
    return tensors or None
