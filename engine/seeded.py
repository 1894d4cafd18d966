"""Models of the presets that need no download: real architectures, weights from a seed.

Every tensor has a random stream of its own, from the seed and its name, so that neither order nor library version
changes it. Scales are chosen so that activations stay near 1, the prompt can be seen in the output, and decoded pixels
use much of [-1, 1]; norm weights are near 1 but not 1, so that a norm left out or applied twice is seen.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config import ModelDims
from engine.model.sharding import param_shapes
from engine.seeded_tokenizer import build_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

# UMT5 in small: what is not here follows the generator's dims.
_TEXT = {"num_layers": 2, "num_heads": 4}
_VAE = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "temperal_downsample": [False, True, True]}
_WIDE = 1024  # from this text width on, one layer: a stand-in for shapes, not for depth


def draw(seed: int, name: str, shape: tuple[int, ...], *, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Normal float32 numbers that depend on the seed, the name and the shape alone."""
    import torch

    key = hashlib.blake2b(f"{seed}|{name}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "big"))
    return torch.randn(shape, generator=generator).mul_(std).add_(mean)


def make_generator(file: Path, dims: ModelDims, seed: int) -> None:
    """Write a generator of these sizes as one safetensors file with original Wan names."""
    from safetensors.torch import save_file

    save_file({name: _generator_tensor(seed, name, shape) for name, shape in param_shapes(dims).items()}, file)


def _generator_tensor(seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    if ".norm" in name and name.endswith("weight"):
        # q and k norms above 1 sharpen attention: over random keys it would else be close to a mean.
        return draw(seed, name, shape, mean=1.5 if "norm_" in name else 1.0, std=0.1)
    if name.endswith("bias"):
        return draw(seed, name, shape, std=0.05)
    if name.endswith("modulation"):
        return draw(seed, name, shape, std=0.3)
    gain = 1.0
    if ".cross_attn.o." in name or ".cross_attn.v." in name:
        gain = 2.0  # attention averages, and half of the text positions may be padding
    return draw(seed, name, shape, std=gain / math.sqrt(math.prod(shape[1:])))


def make_text_encoder(directory: Path, dims: ModelDims, seed: int) -> None:
    """Write a UMT5 encoder of width `dims.text_dim` and its tokenizer."""
    import torch
    from transformers import UMT5Config, UMT5EncoderModel
    from transformers.utils import logging

    from engine.codecs.quiet import quiet

    with quiet(logging):
        vocab_size = build_tokenizer(directory)
        wide = dims.text_dim >= _WIDE
        config = UMT5Config(
            vocab_size=vocab_size,
            d_model=dims.text_dim,
            d_kv=64 if wide else dims.text_dim // _TEXT["num_heads"],
            d_ff=2 * min(dims.text_dim, 256),
            num_layers=1 if wide else _TEXT["num_layers"],
            num_heads=_TEXT["num_heads"],
            dropout_rate=0.0,
        )
        with torch.device("meta"):
            model = UMT5EncoderModel(config)
        model.to_empty(device="cpu")
        model.tie_weights()
        _fill(model, seed, "text", _text_tensor)
        model.save_pretrained(directory)


def _text_tensor(seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    if "layer_norm" in name:
        return draw(seed, name, shape, mean=1.0, std=0.1)
    if "shared" in name or "embed_tokens" in name or "relative_attention_bias" in name:
        return draw(seed, "shared" if "relative" not in name else name, shape)
    # UMT5 does not divide its scores by the square root of the head's width; the weights of q do it instead.
    narrow = 0.35 if name.endswith(".q.weight") else 1.0
    return draw(seed, name, shape, std=narrow / math.sqrt(shape[1]))


def make_vae(directory: Path, seed: int) -> None:
    """Write a narrow AutoencoderKLWan with the latent statistics of the original."""
    import torch
    from diffusers import AutoencoderKLWan
    from diffusers.utils import logging

    from engine.codecs.quiet import quiet

    with quiet(logging):
        with torch.device("meta"):
            model = AutoencoderKLWan(**_VAE)
        model.to_empty(device="cpu")
        _fill(model, seed, "vae", _vae_tensor)
        # The layers at the latent carry its statistics, so that a latent of mean 0 and deviation 1 is an ordinary one
        # both ways, and a normalisation left out is seen.
        mean_C = torch.tensor(model.config.latents_mean)
        std_C = torch.tensor(model.config.latents_std)
        channels = model.config.z_dim
        with torch.no_grad():
            model.post_quant_conv.weight.copy_(torch.diag(1 / std_C).view(channels, channels, 1, 1, 1))
            model.post_quant_conv.bias.copy_(-mean_C / std_C)
            model.quant_conv.weight[:channels] *= std_C.view(-1, 1, 1, 1, 1)
            model.quant_conv.bias[:channels] = mean_C
        model.save_pretrained(directory)


def _vae_tensor(seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    if name.endswith("gamma"):
        return draw(seed, name, shape, mean=1.0, std=0.1)
    if name.endswith("bias"):
        return draw(seed, name, shape, std=0.05)
    gain = 1.4 if name != "decoder.conv_out.weight" else 0.8
    return draw(seed, name, shape, std=gain / math.sqrt(math.prod(shape[1:])))


def _fill(model: Any, seed: int, prefix: str, tensor_of: Any) -> None:
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensor_of(seed, f"{prefix}|{name}" if prefix == "text" else name, tuple(parameter.shape)))
