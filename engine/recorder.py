"""Keeps latents and pixels of a run, so that two runs can be compared value by value."""

from __future__ import annotations

from pathlib import Path

import torch


class Recorder:
    """Collects `chunk_00000`... and writes `latents.safetensors` (float32 [1, F, C, h, w]) and `pixels.safetensors`
    (uint8 [T, H, W, 3]) at the end. Off unless asked for: it holds the whole run in memory."""

    def __init__(self, directory: Path, enabled: bool) -> None:
        self._directory = directory
        self._enabled = enabled
        self._latents: dict[str, torch.Tensor] = {}
        self._pixels: dict[str, torch.Tensor] = {}

    def keep(self, chunk_index: int, latents_BFCHW: torch.Tensor, pixels_THWC: torch.Tensor) -> None:
        if self._enabled:
            key = f"chunk_{chunk_index:05d}"
            self._latents[key] = latents_BFCHW.float().cpu().contiguous()
            self._pixels[key] = pixels_THWC

    def close(self) -> None:
        if not self._enabled:
            return
        from safetensors.torch import save_file

        for name, tensors in (("latents", self._latents), ("pixels", self._pixels)):
            temporary = self._directory / f".{name}.partial"
            save_file(tensors, temporary)
            temporary.replace(self._directory / f"{name}.safetensors")
