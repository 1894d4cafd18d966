"""The Wan VAE as a stream: latents in, frames out, with the causal feature cache kept between calls.

Letters in names: B batch, F latent frames, T pixel frames, C channels, H, W (latents are 8 times smaller each way).
The modules are those of diffusers' AutoencoderKLWan; its own `decode` empties the cache on every call, which is why
the loop over frames is here. The first latent of a stream gives 1 frame, each later one 4.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.codecs.quiet import quiet
from engine.config import VAE_SPATIAL, VAE_TEMPORAL
from engine.errors import CodecError

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
_ENCODER = ("encoder.", "quant_conv.")
_DECODER = ("decoder.", "post_quant_conv.")


class StreamingVAE:
    """One video stream through the VAE. Build it with `load`."""

    def __init__(self, model: Any, *, encoder: bool, decoder: bool) -> None:
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

        def convolutions(module: nn.Module) -> int:
            return sum(isinstance(part, WanCausalConv3d) for part in module.modules())

        # Only what is asked for is kept: `model` itself is dropped, and with it the weights of the other half.
        self._encoder = model.encoder if encoder else None
        self._quant_conv = model.quant_conv if encoder else None
        self._decoder = model.decoder if decoder else None
        self._post_quant_conv = model.post_quant_conv if decoder else None
        self._encoder_slots = convolutions(model.encoder) if encoder else 0
        self._decoder_slots = convolutions(model.decoder) if decoder else 0
        some = next((self._encoder or self._decoder or nn.Identity()).parameters(), torch.empty(0))
        self.dtype, self.device = some.dtype, some.device
        self.latent_channels = int(model.config.z_dim)
        mean_C, std_C = (torch.tensor(model.config[key]).to(some) for key in ("latents_mean", "latents_std"))
        self._mean = mean_C.view(1, -1, 1, 1, 1)
        self._std = std_C.view(1, -1, 1, 1, 1)
        self.reset()

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        encoder: bool = True,
        decoder: bool = True,
    ) -> StreamingVAE:
        """Load from a directory in diffusers' layout (`config.json`, `diffusion_pytorch_model.safetensors`).

        With `encoder=False` the encoder's weights are neither read nor held, and likewise for the decoder.

        Raises:
            CodecError: a file is missing, damaged, of another model, or of a Wan VAE that does not stream here.
        """
        directory = _directory(Path(path))
        config = _config(directory)
        from diffusers import AutoencoderKLWan
        from diffusers.utils import logging

        with quiet(logging):
            try:
                with torch.device("meta"):
                    model = AutoencoderKLWan.from_config(config)
            except (TypeError, ValueError, RuntimeError) as error:
                raise CodecError(f"{directory / 'config.json'} is no Wan VAE: {error}", code="TP-5012") from error
        prefixes = (_ENCODER if encoder else ()) + (_DECODER if decoder else ())
        state = _read(directory / WEIGHTS_FILE, prefixes, device, dtype)
        _compare(directory, {n: p for n, p in model.state_dict().items() if n.startswith(prefixes)}, state)
        model.load_state_dict(state, strict=False, assign=True)
        model.requires_grad_(False).eval()
        return cls(model, encoder=encoder, decoder=decoder)

    def reset(self) -> None:
        """A hard cut: the next latent is the first of a stream."""
        self._features: list[Any] = [None] * self._decoder_slots
        self._decoded_latents = 0
        self._seen_features: list[Any] = [None] * self._encoder_slots
        self._encoded_latents = 0

    @property
    def decoded_latents(self) -> int:
        """Latent frames decoded since the last hard cut."""
        return self._decoded_latents

    @torch.no_grad()
    def decode(self, latents_BFCHW: Tensor) -> Tensor:
        """Decode the next F >= 1 latents of the stream: [B, 4F (4F-3 at its start), 3, 8H, 8W] in [-1, 1].

        The bits do not depend on how the stream is cut into calls.
        """
        if self._decoder is None or self._post_quant_conv is None:
            raise CodecError("this VAE was loaded without its decoder", code="TP-5014")
        self._check(latents_BFCHW, self.latent_channels, "latents")
        normal_BCFHW = latents_BFCHW.to(device=self.device, dtype=self.dtype).transpose(1, 2)
        z_BCFHW = normal_BCFHW * self._std + self._mean
        frames = []
        for index in range(z_BCFHW.shape[2]):
            x_BC1HW = self._post_quant_conv(z_BCFHW[:, :, index : index + 1].contiguous())
            pixels_BCTHW = self._decoder(
                x_BC1HW, feat_cache=self._features, feat_idx=[0], first_chunk=self._decoded_latents == 0
            )
            self._decoded_latents += 1
            frames.append(pixels_BCTHW.clamp_(-1.0, 1.0).transpose(1, 2))
        return torch.cat(frames, dim=1)

    def encode_frame(self, pixels_B1CHW: Tensor) -> Tensor:
        """Encode one frame as the first of a stream of its own: normalised latent [B, 1, C, H/8, W/8].

        The mode of the distribution, so no randomness. The state of `decode` is not touched.
        """
        if pixels_B1CHW.ndim == 5 and pixels_B1CHW.shape[1] != 1:
            raise CodecError(f"encode_frame takes one frame, got {tuple(pixels_B1CHW.shape)}", code="TP-5013")
        return self.encode(pixels_B1CHW)

    def encode(self, pixels_BTCHW: Tensor) -> Tensor:
        """Encode a whole clip of 1 + 4n frames in [-1, 1] to 1 + n normalised latents [B, 1+n, C, H/8, W/8]."""
        return self._encode(pixels_BTCHW, [None] * self._encoder_slots, first=True)

    def encode_next(self, pixels_BTCHW: Tensor) -> Tensor:
        """Encode the next frames of the stream of a source: F latents of 4F frames (4F - 3 at its start).

        The bits do not depend on how the stream is cut into calls. `encode` and `encode_frame` leave it alone.
        """
        latents_BFCHW = self._encode(pixels_BTCHW, self._seen_features, first=self._encoded_latents == 0)
        self._encoded_latents += latents_BFCHW.shape[1]
        return latents_BFCHW

    @torch.no_grad()
    def _encode(self, pixels_BTCHW: Tensor, features: list[Any], *, first: bool) -> Tensor:
        if self._encoder is None or self._quant_conv is None:
            raise CodecError("this VAE was loaded without its encoder", code="TP-5014")
        self._check(pixels_BTCHW, 3, "pixels")
        count, alone = pixels_BTCHW.shape[1], int(first)
        if (count - alone) % VAE_TEMPORAL or pixels_BTCHW.shape[3] % VAE_SPATIAL or pixels_BTCHW.shape[4] % VAE_SPATIAL:
            raise CodecError(
                f"the VAE encodes {'1 + ' * alone}4n frames with sides that are multiples of {VAE_SPATIAL}, "
                f"got {tuple(pixels_BTCHW.shape)}",
                code="TP-5013",
            )
        x_BCTHW = pixels_BTCHW.to(device=self.device, dtype=self.dtype).transpose(1, 2).contiguous()
        encoded = [
            self._encoder(part_BCTHW, feat_cache=features, feat_idx=[0])
            for part_BCTHW in torch.tensor_split(
                x_BCTHW, tuple(range(1 if first else VAE_TEMPORAL, count, VAE_TEMPORAL)), dim=2
            )
        ]
        moments_BCFHW = self._quant_conv(torch.cat(encoded, dim=2))
        mean_BCFHW = moments_BCFHW.chunk(2, dim=1)[0]
        latents_BCFHW: Tensor = (mean_BCFHW - self._mean) / self._std
        return latents_BCFHW.transpose(1, 2).contiguous()

    @staticmethod
    def _check(tensor: Tensor, channels: int, what: str) -> None:
        if tensor.ndim != 5 or tensor.shape[1] < 1 or tensor.shape[2] != channels:
            raise CodecError(
                f"{what} must be [B, frames >= 1, {channels}, H, W], are {tuple(tensor.shape)}", code="TP-5013"
            )


def _directory(path: Path) -> Path:
    """`path`, or its `vae` directory as diffusers pipelines lay it out, with both files in it."""
    place = path if (path / "config.json").is_file() else path / "vae"
    missing = [name for name in ("config.json", WEIGHTS_FILE) if not (place / name).is_file()]
    if missing:
        raise CodecError(
            f"no VAE at {path}: expected config.json and {WEIGHTS_FILE} in it (or in its directory vae), "
            f"{' and '.join(missing)} missing",
            code="TP-5010",
            where=str(path),
            evidence={"missing_files": missing},
            next_step="tpctl config check",
        )
    return place


def _config(directory: Path) -> dict[str, Any]:
    file = directory / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CodecError(f"{file} is not JSON: {error}", code="TP-5011", where=str(file)) from error
    if not isinstance(config, dict) or config.get("_class_name", "AutoencoderKLWan") != "AutoencoderKLWan":
        raise CodecError(f"{file} does not describe an AutoencoderKLWan", code="TP-5012", where=str(file))
    if config.get("is_residual") or config.get("patch_size") is not None:
        raise CodecError(f"{file} is of a Wan2.2 VAE; this engine serves Wan2.1's", code="TP-5012", where=str(file))
    return config


def _read(file: Path, prefixes: tuple[str, ...], device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            # Copies: a view would keep the whole file mapped.
            return {
                name: tensors.get_tensor(name).to(device=device, dtype=dtype, copy=True)
                for name in tensors.keys()  # noqa: SIM118 (a safetensors handle is no mapping)
                if name.startswith(prefixes)
            }
    except (SafetensorError, OSError) as error:
        raise CodecError(
            f"{file} ({file.stat().st_size} bytes) is truncated or corrupt: {error}",
            code="TP-5011",
            where=str(file),
            next_step="copy the file again and compare its size with the original",
        ) from error


def _compare(directory: Path, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    wrong = [
        f"{name}: {tuple(expected[name].shape) if name in expected else 'not'} expected, "
        f"{tuple(found[name].shape) if name in found else 'not'} found"
        for name in sorted(set(expected) | set(found))
        if name not in expected or name not in found or expected[name].shape != found[name].shape
    ]
    if wrong:
        raise CodecError(
            f"{directory / WEIGHTS_FILE} does not fit its config.json in {len(wrong)} tensors: "
            + "; ".join(wrong[:10]),
            code="TP-5012",
            where=str(directory),
            evidence={"tensors": wrong},
        )
