"""Parameter names of other layouts, translated to the original Wan names."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Prefixes that trainers and wrappers leave behind; they carry no meaning and may stand anywhere in a name.
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
# And those that hold a whole model. A prefix is dropped only if every name has it.
_ROOTS = ("model.", "module.", "generator.")

# diffusers' WanTransformer3DModel -> original. The norm before cross-attention changes its number: diffusers counts
# the norms in the order of use (norm2), the original in the order of definition (norm3).
_DIFFUSERS: tuple[tuple[str, str], ...] = (
    (r"condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
    (r"condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
    (r"condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
    (r"condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
    (r"condition_embedder\.time_proj\.", "time_projection.1."),
    (r"scale_shift_table$", "head.modulation"),
    (r"proj_out\.", "head.head."),
    (r"(blocks\.\d+)\.scale_shift_table$", r"\1.modulation"),
    (r"(blocks\.\d+)\.norm2\.", r"\1.norm3."),
    (r"(blocks\.\d+)\.ffn\.net\.0\.proj\.", r"\1.ffn.0."),
    (r"(blocks\.\d+)\.ffn\.net\.2\.", r"\1.ffn.2."),
    (r"(blocks\.\d+)\.attn1\.to_out\.0\.", r"\1.self_attn.o."),
    (r"(blocks\.\d+)\.attn2\.to_out\.0\.", r"\1.cross_attn.o."),
    (r"(blocks\.\d+)\.attn1\.to_([qkv])\.", r"\1.self_attn.\2."),
    (r"(blocks\.\d+)\.attn2\.to_([qkv])\.", r"\1.cross_attn.\2."),
    (r"(blocks\.\d+)\.attn1\.(norm_[qk])\.", r"\1.self_attn.\2."),
    (r"(blocks\.\d+)\.attn2\.(norm_[qk])\.", r"\1.cross_attn.\2."),
)
_COMPILED = tuple((re.compile(pattern), replacement) for pattern, replacement in _DIFFUSERS)


def translate(names: Iterable[str]) -> tuple[str, dict[str, str]]:
    """Name the layout, and map original Wan names to the names in the file.

    Returns:
        ("wan" or "diffusers", {original name: name in the file}). Names that no rule knows map to themselves, so that
        the caller reports them as unexpected.
    """
    bare = {name: _unwrapped(name) for name in names}
    for root in _ROOTS:
        if bare and all(name.startswith(root) for name in bare.values()):
            bare = {name: short.removeprefix(root) for name, short in bare.items()}
    layout = "diffusers" if any(_is_diffusers(name) for name in bare.values()) else "wan"
    if layout == "diffusers":
        bare = {name: _from_diffusers(short) for name, short in bare.items()}
    return layout, {original: name for name, original in bare.items()}


def _unwrapped(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _is_diffusers(name: str) -> bool:
    return name.startswith("condition_embedder.") or ".attn1." in name


def _from_diffusers(name: str) -> str:
    for pattern, replacement in _COMPILED:
        if pattern.match(name):
            return pattern.sub(replacement, name, count=1)
    return name
