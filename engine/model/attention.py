"""Scaled dot-product attention over a view of the cache, with an optional bias a key.

Two backends. `sdpa` takes the bias as a mask that is broadcast over queries, never written out. `flex` takes it into
a compiled kernel as a score modification; without a bias both are the same fused kernel. No other mask exists here:
block-causal attention is one call a block over the keys it may see, so what is hidden never enters a softmax.

Shape legend: B batch, L queries, T keys, H this rank's heads, d head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import ConfigError

FLEX_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}


def attend(q_BLHd: Tensor, k_BTHd: Tensor, v_BTHd: Tensor, bias_T: Tensor | None = None, *, backend: str) -> Tensor:
    """softmax(q k / sqrt(d) + bias) v, as [B, L, H, d]. `bias_T` has the dtype of q."""
    q_BHLd, k_BHTd, v_BHTd = q_BLHd.transpose(1, 2), k_BTHd.transpose(1, 2), v_BTHd.transpose(1, 2)
    if bias_T is None:
        return F.scaled_dot_product_attention(q_BHLd, k_BHTd, v_BHTd).transpose(1, 2)
    if backend == "flex":
        return _compiled_flex()(q_BHLd, k_BHTd, v_BHTd, bias_T).transpose(1, 2)
    mask_11LT = bias_T.expand(1, 1, q_BHLd.shape[2], -1)
    return F.scaled_dot_product_attention(q_BHLd, k_BHTd, v_BHTd, attn_mask=mask_11LT).transpose(1, 2)


def attend_block_causal(q_BLHd: Tensor, k_BTHd: Tensor, v_BTHd: Tensor, block_tokens: int, *, backend: str) -> Tensor:
    """Each block of `block_tokens` sees itself and all blocks before it; L == T. As [B, L, H, d]."""
    length = q_BLHd.shape[1]
    parts = []
    for start in range(0, length, block_tokens):
        end = min(start + block_tokens, length)
        parts.append(attend(q_BLHd[:, start:end], k_BTHd[:, :end], v_BTHd[:, :end], backend=backend))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def resolve_backend(requested: str, device: str, dtype: str) -> tuple[str, str]:
    """The backend that will run, and why.

    Args:
        requested: `auto`, `sdpa` or `flex`.
        device: `cpu`, `cuda` or `cuda:0`, as torch writes it.
        dtype: `float32`, `bfloat16` or `float16`.

    Returns:
        ("sdpa" | "flex", reason).

    Raises:
        ConfigError: `flex` was asked for by name and cannot run here, or `requested` is unknown.
    """
    if requested == "sdpa":
        return "sdpa", "asked for"
    if requested == "flex":
        failure = flex_failure(device, dtype)
        if failure is None:
            return "flex", "asked for; its kernel was compiled here and agrees with sdpa"
        raise ConfigError(
            f"attention_backend 'flex' cannot run on {device} in {dtype}: {failure}",
            code="TP-1031",
            evidence={"requested": requested, "device": device, "dtype": dtype, "failure": failure},
            next_step="tpctl config check --set model.attention_backend=sdpa",
        )
    if requested != "auto":
        raise ConfigError(f"attention_backend is {requested!r}; known: auto, sdpa, flex", code="TP-1007")
    if torch.device(device).type != "cuda":
        return "sdpa", "auto: off CUDA a broadcast mask costs next to nothing, and flex would need a compiler run"
    failure = flex_failure(device, dtype)
    if failure is None:
        return "flex", "auto: its kernel was compiled here and agrees with sdpa, whose fastest kernel takes no mask"
    return "sdpa", f"auto: flex cannot run here: {failure}"


@functools.cache
def flex_failure(device: str, dtype: str) -> str | None:
    """Compile flex for one small case and compare it with sdpa. None, or the reason why it is of no use (seconds)."""
    try:
        generator = torch.Generator("cpu").manual_seed(0)
        kind: torch.dtype = getattr(torch, dtype)
        shapes = ((1, 128, 2, 64), (1, 256, 2, 64), (1, 256, 2, 64), (256,))
        q, k, v, bias = (torch.randn(shape, generator=generator).to(device, kind) for shape in shapes)
        flex = attend(q, k, v, bias, backend="flex")
        difference = (flex.float() - attend(q, k, v, bias, backend="sdpa").float()).abs().max().item()
    # The compiler's own errors all derive from RuntimeError; a missing toolchain shows as one of the others.
    except (RuntimeError, ImportError, OSError, AssertionError, ValueError, LookupError, TypeError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return lines[0] if lines else type(error).__name__
    if not difference <= FLEX_TOLERANCE[dtype]:
        return f"its result differs from sdpa's by {difference:.1e}"
    return None


@functools.cache
def _compiled_flex() -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    def biased(q_BHLd: Tensor, k_BHTd: Tensor, v_BHTd: Tensor, bias_T: Tensor) -> Tensor:
        def add_bias(score: Tensor, _b: Tensor, _h: Tensor, _q: Tensor, key: Tensor) -> Tensor:
            return score + bias_T[key]

        result: Tensor = flex_attention(q_BHLd, k_BHTd, v_BHTd, score_mod=add_bias)
        return result

    return torch.compile(biased, dynamic=False)
