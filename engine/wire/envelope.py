"""One chunk in memory, its two wire schemas, and which plan carries what (contract, section 7).

B batch (1), F frames a chunk, K context frames, C latent channels, h w latent height and width, L text length,
D text width, n denoise steps.

In memory a tensor has one name; `META_NAMES` and `TENSOR_NAMES` give the names on the TP and on the pp wire.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from engine.config import VAE_SPATIAL, EngineConfig
from engine.errors import CallCountError
from engine.plan import PP0, PP1, V0, V1, V11A, V11B, ChunkPlan
from engine.wire.problem import Problem
from engine.wire.specs import ITEM_BYTES, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

TP_ENVELOPE_VERSION = 1
PP_ENVELOPE_VERSION = 1
MAX_STEPS = 1000  # the schedule has a thousand values

LATENTS = "latents"
RENOISE = "renoise"
CONDITIONING = "conditioning_embeds"
STEPS = "denoising_step_list"
CONTEXT = "context_frames"

# Which tensors a plan carries. Nothing else may be there, and nothing of it may be missing.
CARRIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        V0: (STEPS,),
        V11A: (STEPS, CONDITIONING),
        V11B: (STEPS, CONDITIONING, LATENTS, RENOISE, CONTEXT),
        V1: (STEPS, CONDITIONING, LATENTS, RENOISE, CONTEXT),
        PP0: (STEPS, CONDITIONING, LATENTS, RENOISE, CONTEXT),
        PP1: (STEPS, CONDITIONING, LATENTS, RENOISE, CONTEXT),
    }
)
CARRIES_PROMPT = frozenset({V0})
# v1.1b workers keep a VAE decoder's worth of context themselves and lack only the re-encoded anchor.
CARRIES_ANCHOR_ONLY = frozenset({V11B})


@dataclass(frozen=True)
class Name:
    """One value of the plan: its `ChunkPlan` attribute, its names on both wires, its type in JSON."""

    attribute: str
    tp: str
    pp: str
    kind: str


META_NAMES = (
    Name("height", "height", "height", "int"),
    Name("width", "width", "width", "int"),
    Name("current_start_frame", "current_start_frame", "current_start_frame", "int"),
    Name("init_cache", "init_cache", "init_cache", "bool"),
    Name("reset_kv_cache", "tp_reset_kv_cache", "reset_kv_cache", "bool"),
    Name("reset_crossattn_cache", "tp_reset_crossattn_cache", "reset_crossattn_cache", "bool"),
    Name("conditioning_embeds_updated", "conditioning_embeds_updated", "conditioning_embeds_updated", "bool"),
    Name("kv_cache_attention_bias", "kv_cache_attention_bias", "kv_cache_attention_bias", "number"),
    Name("do_kv_recompute", "tp_do_kv_recompute", "do_kv_recompute", "bool"),
    Name("num_denoise_steps", "tp_num_denoise_steps", "num_denoise_steps", "int"),
    Name("expected_calls", "tp_expected_generator_calls", "expected_generator_calls", "int"),
    Name("base_seed", "base_seed", "base_seed", "int"),
    Name("noise_scale", "noise_scale", "noise_scale", "null"),
    Name("clean_pass", "tp_clean_pass", "clean_pass", "bool"),
)
TENSOR_NAMES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        LATENTS: (LATENTS, "latents_in"),
        RENOISE: (RENOISE, RENOISE),
        CONDITIONING: (CONDITIONING, CONDITIONING),
        STEPS: (STEPS, "current_denoising_step_list"),
        CONTEXT: ("context_frames_override", CONTEXT),
    }
)
TP_TENSOR = MappingProxyType({memory: tp for memory, (tp, _) in TENSOR_NAMES.items()})
MEMORY_TENSOR = MappingProxyType({tp: memory for memory, tp in TP_TENSOR.items()})
NULLABLE = TP_TENSOR[CONTEXT]

_KINDS: Mapping[str, tuple[tuple[type, ...], str]] = MappingProxyType(
    {
        "int": ((int,), "a whole number"),
        "bool": ((bool,), "true or false"),
        "number": ((int, float), "a number"),
        "null": ((type(None),), "null"),
        "text": ((str,), "text"),
    }
)
_PP_ONLY = "pp_disable_vace"


@dataclass(frozen=True)
class Envelope:
    """What Stage 0 hands to the mesh for one chunk.

    `tensors` holds exactly what `CARRIES[tp_plan]` says, by in-memory name:
    `latents` [1,F,C,h,w], `renoise` [n-1,1,F,C,h,w] (absent when n = 1), `conditioning_embeds` [1,L,D],
    `denoising_step_list` int64 [n], and `context_frames` [1,K',C,h,w], which is an explicit None without recompute.
    K' is 1 under v1.1b (the anchor alone), else min(K, current_start_frame). `prompt` is for v0 only.
    """

    tp_plan: str
    plan: ChunkPlan
    prompt: str | None
    tensors: Mapping[str, Tensor | None]


@dataclass(frozen=True)
class Shapes:
    """Sizes that both ends agreed on at start-up. `dtype` names that of every tensor but the step list."""

    frames_per_chunk: int
    context_frames: int
    channels: int
    latent_h: int
    latent_w: int
    text_len: int
    text_dim: int
    dtype: str

    @classmethod
    def of(cls, config: EngineConfig) -> Shapes:
        latent_h, latent_w = config.latent_hw
        return cls(
            frames_per_chunk=config.geometry.frames_per_chunk,
            context_frames=config.geometry.context_frames,
            channels=config.dims.in_dim,
            latent_h=latent_h,
            latent_w=latent_w,
            text_len=config.dims.text_len,
            text_dim=config.dims.text_dim,
            dtype=config.model.dtype,
        )

    def expected(
        self, tp_plan: str, *, num_steps: int, do_kv_recompute: bool, current_start_frame: int
    ) -> dict[str, tuple[tuple[int, ...], str] | None]:
        """Shape and dtype of each tensor of a chunk, by in-memory name; None where an explicit null belongs."""
        frame = (self.channels, self.latent_h, self.latent_w)
        context = 1 if tp_plan in CARRIES_ANCHOR_ONLY else min(self.context_frames, current_start_frame)
        known: dict[str, tuple[tuple[int, ...], str] | None] = {
            STEPS: ((num_steps,), "int64"),
            CONDITIONING: ((1, self.text_len, self.text_dim), self.dtype),
            LATENTS: ((1, self.frames_per_chunk, *frame), self.dtype),
            RENOISE: ((num_steps - 1, 1, self.frames_per_chunk, *frame), self.dtype),
            CONTEXT: ((1, context, *frame), self.dtype) if do_kv_recompute else None,
        }
        return {name: known[name] for name in CARRIES[tp_plan] if name != RENOISE or num_steps > 1}


def tp_meta(envelope: Envelope) -> dict[str, Any]:
    """The TP envelope v1 as plain data, tensors aside. `chunk_index` and the epochs travel in the header."""
    meta = {name.tp: getattr(envelope.plan, name.attribute) for name in META_NAMES}
    meta["tp_plan"] = envelope.tp_plan
    meta["tp_envelope_version"] = TP_ENVELOPE_VERSION
    if envelope.prompt is not None:
        meta["prompt"] = envelope.prompt
    if envelope.tensors.get(CONTEXT, ...) is None:
        meta[NULLABLE] = None
    return meta


def tp_from_meta(
    meta: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    chunk_index: int = -1,
    cache_epoch: int = 0,
    control_epoch: int = 0,
) -> Envelope:
    """The inverse of `tp_meta`, for a meta that passed `tp_meta_problem`.

    Args:
        meta: the envelope part of the meta, by TP names.
        tensors: by TP names. The step list of the plan is read from its tensor, never from elsewhere.
        chunk_index, cache_epoch, control_epoch: from the header.
    """
    held: dict[str, Tensor | None] = {MEMORY_TENSOR[name]: tensor for name, tensor in tensors.items()}
    if NULLABLE in meta:
        held[CONTEXT] = None
    plan = ChunkPlan(
        chunk_index=chunk_index,
        cache_epoch=cache_epoch,
        control_epoch=control_epoch,
        denoising_step_list=tuple(tensors[TP_TENSOR[STEPS]].tolist()),
        **{name.attribute: meta[name.tp] for name in META_NAMES},
    )
    return Envelope(meta["tp_plan"], plan, meta.get("prompt"), MappingProxyType(held))


def tp_meta_problem(meta: Mapping[str, Any], tp_plan: str, shapes: Shapes) -> Problem | None:
    """Keys, types and ranges of a TP envelope v1 against the plan in force; nothing is inferred."""
    if meta.get("tp_plan") != tp_plan or tp_plan not in CARRIES:
        return Problem(
            "tp_plan", f"the envelope says {meta.get('tp_plan')!r}, this rank runs {tp_plan!r}", "21", "FM-01"
        )
    if type(meta.get("tp_envelope_version")) is not int or meta["tp_envelope_version"] != TP_ENVELOPE_VERSION:
        return Problem(
            "tp_envelope_version", f"{meta.get('tp_envelope_version')!r}; this build speaks {TP_ENVELOPE_VERSION}", "11"
        )
    kinds = {name.tp: name.kind for name in META_NAMES}
    if meta.get("noise_scale") is not None:
        return Problem("noise_scale", "video-to-video is not supported, so it must be null", "30")
    if tp_plan in CARRIES_PROMPT:
        kinds["prompt"] = "text"
    if CONTEXT in CARRIES[tp_plan] and meta.get("tp_do_kv_recompute") is False:
        kinds[NULLABLE] = "null"
    for key, kind in kinds.items():
        if key not in meta:
            if key == NULLABLE:
                return Problem(key, "must be an explicit null, since recompute is not planned", "16", "FM-06")
            return Problem(key, f"missing under {tp_plan}", "16", "FM-06")
        types, wanted = _KINDS[kind]
        if type(meta[key]) not in types:
            return Problem(key, f"must be {wanted}, is {meta[key]!r}", "22")
    extra = sorted(meta.keys() - kinds.keys() - {"tp_plan", "tp_envelope_version"})
    if extra:
        if extra == [NULLABLE] and CONTEXT in CARRIES[tp_plan]:
            return Problem(NULLABLE, "null, but recompute is planned", "16", "FM-06")
        return Problem(extra[0], f"not expected under {tp_plan}", "17")
    for key, wanted_size in (("height", shapes.latent_h * VAE_SPATIAL), ("width", shapes.latent_w * VAE_SPATIAL)):
        if meta[key] != wanted_size:
            return Problem(key, f"{meta[key]}, but the handshake agreed on {wanted_size}", "22")
    if meta["current_start_frame"] < 0:
        return Problem("current_start_frame", f"{meta['current_start_frame']} is below 0", "22")
    return None


def specs_problem(meta: Mapping[str, Any], specs: Sequence[TensorSpec], shapes: Shapes) -> Problem | None:
    """Specs against the schema, before anything is allocated. `meta` passed `tp_meta_problem`.

    Raises:
        CallCountError: the step list's length is not the number of steps (FM-02).
    """
    steps = meta["tp_num_denoise_steps"]
    if not 1 <= steps <= MAX_STEPS:
        return Problem("tp_num_denoise_steps", f"{steps} is outside 1..{MAX_STEPS}", "22")
    tp_plan = meta["tp_plan"]
    wanted = shapes.expected(
        tp_plan,
        num_steps=steps,
        do_kv_recompute=meta["tp_do_kv_recompute"],
        current_start_frame=meta["current_start_frame"],
    )
    found = {(spec.key, spec.index): spec for spec in specs}
    step_list = found.get((TP_TENSOR[STEPS], 0))
    if step_list is not None and step_list.shape != (steps,):
        raise CallCountError(
            f"tp_num_denoise_steps is {steps}, but denoising_step_list has the shape {list(step_list.shape)}",
            code="TP-6102",
            evidence={"num_denoise_steps": steps, "shape": step_list.shape},
        )
    for name, shape_dtype in wanted.items():
        key = TP_TENSOR[name]
        spec = found.pop((key, 0), None)
        if shape_dtype is None:
            if spec is not None:
                return Problem(key, "carried, but recompute is not planned", "17", "FM-01")
        elif spec is None:
            return Problem(key, f"missing under {tp_plan}", "16", "FM-06")
        elif spec.shape != shape_dtype[0]:
            return Problem(key, f"shape {list(spec.shape)}, expected {list(shape_dtype[0])}", "18")
        elif spec.dtype != shape_dtype[1]:
            return Problem(key, f"dtype {spec.dtype}, expected {shape_dtype[1]}", "19", "FM-07")
    if found:
        key, index = min(found)
        return Problem(key, f"tensor {index} is not expected under {tp_plan}", "17")
    return None


def tensors_problem(envelope: Envelope, shapes: Shapes, device: str) -> Problem | None:
    """Every tensor in memory against the schema: names, type, dtype, shape, device, layout, and the step list."""
    plan, tensors = envelope.plan, envelope.tensors
    wanted = shapes.expected(
        envelope.tp_plan,
        num_steps=plan.num_denoise_steps,
        do_kv_recompute=plan.do_kv_recompute,
        current_start_frame=plan.current_start_frame,
    )
    for name in tensors:
        if name not in wanted:
            return Problem(str(name), f"not expected under {envelope.tp_plan}", "17")
    for name, shape_dtype in wanted.items():
        tensor = tensors.get(name, ...)  # an explicit None is not the same as nothing
        if tensor is ... or (tensor is None and shape_dtype is not None):
            return Problem(name, f"missing under {envelope.tp_plan}", "16", "FM-06")
        if shape_dtype is None:
            if tensor is not None:
                return Problem(name, "carried, but recompute is not planned", "17", "FM-01")
            continue
        problem = _tensor_problem(name, tensor, shape_dtype, device)
        if problem is not None:
            return problem
    held = tensors[STEPS]
    if held is not None and held.tolist() != list(plan.denoising_step_list):
        return Problem(
            STEPS, f"the tensor holds {held.tolist()}, the plan {list(plan.denoising_step_list)}", "23", "FM-01"
        )
    return None


def _tensor_problem(name: str, tensor: Any, wanted: tuple[tuple[int, ...], str], device: str) -> Problem | None:
    import torch

    shape, dtype = wanted
    if not isinstance(tensor, torch.Tensor):
        return Problem(name, f"a {type(tensor).__name__}, not a tensor", "22")
    found = str(tensor.dtype).removeprefix("torch.")
    if found not in ITEM_BYTES:
        return Problem(name, f"unsupported dtype {tensor.dtype}; known: {', '.join(ITEM_BYTES)}", "19", "FM-07")
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        return Problem(name, f"layout {tensor.layout}; only plain strided tensors travel", "20")
    if tensor.shape != shape:
        return Problem(name, f"shape {list(tensor.shape)}, expected {list(shape)}", "18")
    if found != dtype:
        return Problem(name, f"dtype {found}, expected {dtype}", "19", "FM-07")
    if tensor.device.type == "meta" or str(tensor.device) != device:
        return Problem(name, f"on {tensor.device}, but the buffer is on {device}", "20")
    return None


def pp_meta(envelope: Envelope) -> dict[str, Any]:
    """The pp envelope v1 as plain data, tensors aside."""
    meta = {name.pp: getattr(envelope.plan, name.attribute) for name in META_NAMES}
    meta["pp_envelope_version"] = PP_ENVELOPE_VERSION
    meta[_PP_ONLY] = True
    if envelope.tensors.get(CONTEXT, ...) is None:
        meta[TENSOR_NAMES[CONTEXT][1]] = None
    return meta
