"""What a generator-only worker must not hold: the parts of Stage 0."""

from __future__ import annotations

from typing import Any

import torch

from engine.faults.scene import Method, Scene, wrap


def full_worker(scene: Scene) -> None:
    """It warms up the full pipeline: loads text encoder and VAE, decodes a chunk, and holds all of it from then on."""
    from engine.materials import RANK0, Materials  # here and nowhere else does a mesh rank import the codecs

    scene.inject()
    device = next(scene.stage1.dit.parameters()).device.type
    config = scene.stage1.config
    held = Materials(config, RANK0, device, lambda _: None)
    frames, dims = config.geometry.frames_per_chunk, config.dims
    held.decode(torch.zeros(1, frames, dims.in_dim, *config.latent_hw, device=device))
    wrap(scene.stage1, "step", lambda step: _Beside(step, held))


class _Beside:
    """A step, and what is held for as long as the step is."""

    def __init__(self, step: Method, held: object) -> None:
        self._step = step
        self._held = held

    def __call__(self, *args: Any) -> Any:
        return self._step(*args)
