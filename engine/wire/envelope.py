"""One chunk in memory, which plan carries what of it, and the schema of both its wires (contract, section 7).

B batch (1), F frames a chunk, K context frames, C latent channels, h w latent height and width, L text length,
D text width, n denoise steps.

In memory a value has one name; `engine.wire.dialect` gives its names on the TP and on the pp wire.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from engine.config import VAE_SPATIAL, EngineConfig
from engine.errors import CallCountError
from engine.plan import PP0, PP1, V0, V1, V11A, V11B, ChunkPlan
from engine.wire.dialect import CONDITIONING, CONTEXT, LATENTS, RENOISE, STEPS, Dialect
from engine.wire.problem import Problem
from engine.wire.specs import ITEM_BYTES, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

MAX_STEPS = 1000  # the schedule has a thousand values

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


_KINDS: Mapping[str, tuple[tuple[type, ...], str]] = MappingProxyType(
    {
        "int": ((int,), "a whole number"),
        "bool": ((bool,), "true or false"),
        "number": ((int, float), "a number"),
        "null": ((type(None),), "null"),
        "share": ((int, float, type(None)), "a number in (0, 1], or null"),
        "text": ((str,), "text"),
    }
)


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

    def latents(self) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of a chunk's latents, in and out."""
        return (1, self.frames_per_chunk, self.channels, self.latent_h, self.latent_w), self.dtype

    def expected(
        self, tp_plan: str, *, num_steps: int, do_kv_recompute: bool, current_start_frame: int
    ) -> dict[str, tuple[tuple[int, ...], str] | None]:
        """Shape and dtype of each tensor of a chunk, by in-memory name; None where an explicit null belongs."""
        frame = (self.channels, self.latent_h, self.latent_w)
        context = 1 if tp_plan in CARRIES_ANCHOR_ONLY else min(self.context_frames, current_start_frame)
        known: dict[str, tuple[tuple[int, ...], str] | None] = {
            STEPS: ((num_steps,), "int64"),
            CONDITIONING: ((1, self.text_len, self.text_dim), self.dtype),
            LATENTS: self.latents(),
            RENOISE: ((num_steps - 1, 1, self.frames_per_chunk, *frame), self.dtype),
            CONTEXT: ((1, context, *frame), self.dtype) if do_kv_recompute else None,
        }
        return {name: known[name] for name in CARRIES[tp_plan] if name != RENOISE or num_steps > 1}


def envelope_meta(envelope: Envelope, wire: Dialect) -> dict[str, Any]:
    """The envelope as plain data, tensors aside. `chunk_index` and the epochs travel in the header."""
    meta: dict[str, Any] = {key: getattr(envelope.plan, attribute) for attribute, key in wire.meta.items()}
    meta[wire.version_key] = wire.version
    meta |= wire.constants
    if wire.plan_key is not None:
        meta[wire.plan_key] = envelope.tp_plan
    if envelope.prompt is not None:
        meta["prompt"] = envelope.prompt
    if envelope.tensors.get(CONTEXT, ...) is None:
        meta[wire.nullable] = None
    return meta


def envelope_from_meta(
    meta: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    wire: Dialect,
    tp_plan: str,
    *,
    chunk_index: int = -1,
    cache_epoch: int = 0,
    control_epoch: int = 0,
) -> Envelope:
    """The inverse of `envelope_meta`, for a meta that passed `meta_problem`.

    Args:
        meta: the envelope part of the meta, by the wire's names.
        tensors: by the wire's names. The step list of the plan is read from its tensor, never from elsewhere.
        wire: whose names these are.
        tp_plan: the plan in force.
        chunk_index, cache_epoch, control_epoch: from the header.
    """
    memory = {key: name for name, key in wire.tensor.items()}
    held: dict[str, Tensor | None] = {memory[key]: tensor for key, tensor in tensors.items()}
    if wire.nullable in meta:
        held[CONTEXT] = None
    plan = ChunkPlan(
        chunk_index=chunk_index,
        cache_epoch=cache_epoch,
        control_epoch=control_epoch,
        denoising_step_list=tuple(tensors[wire.tensor[STEPS]].tolist()),
        **{attribute: meta[key] for attribute, key in wire.meta.items()},
    )
    return Envelope(tp_plan, plan, meta.get("prompt"), MappingProxyType(held))


def meta_problem(meta: Mapping[str, Any], tp_plan: str, shapes: Shapes, wire: Dialect) -> Problem | None:
    """Keys, types and ranges of an envelope against the plan in force; nothing is inferred."""
    said = meta.get(wire.plan_key) if wire.plan_key is not None else tp_plan
    if said != tp_plan or tp_plan not in CARRIES:
        return Problem("tp_plan", f"the envelope says {said!r}, this rank runs {tp_plan!r}", "21", "FM-01")
    version = meta.get(wire.version_key)
    if type(version) is not int or version != wire.version:
        return Problem(wire.version_key, f"{version!r}; this build speaks {wire.version}", "11")
    for key, value in wire.constants.items():
        if meta.get(key) is not value:
            return Problem(key, f"must be {str(value).lower()}, is {meta.get(key, 'missing')!r}", "31")
    if not wire.v2v and meta.get(wire.meta["noise_scale"]) is not None:
        return Problem("noise_scale", f"version {wire.version} has no video-to-video, so it must be null", "30")
    kinds = dict(wire.kinds)
    if tp_plan in CARRIES_PROMPT:
        kinds["prompt"] = "text"
    recompute = wire.meta["do_kv_recompute"]
    if CONTEXT in CARRIES[tp_plan] and meta.get(recompute) is False:
        kinds[wire.nullable] = "null"
    for key, kind in kinds.items():
        if key not in meta:
            if key == wire.nullable:
                return Problem(key, "must be an explicit null, since recompute is not planned", "16", "FM-06")
            return Problem(key, f"missing under {tp_plan}", "16", "FM-06")
        types, wanted = _KINDS[kind]
        if type(meta[key]) not in types:
            return Problem(key, f"must be {wanted}, is {meta[key]!r}", "22")
    scale = meta[wire.meta["noise_scale"]]
    if scale is not None and not 0 < scale <= 1:
        return Problem("noise_scale", f"must be in (0, 1], is {scale}", "30")
    extra = sorted(meta.keys() - kinds.keys() - wire.constants.keys() - {wire.plan_key, wire.version_key})
    if extra:
        if extra == [wire.nullable] and CONTEXT in CARRIES[tp_plan]:
            return Problem(wire.nullable, "null, but recompute is planned", "16", "FM-06")
        return Problem(extra[0], f"not expected under {tp_plan}", "17")
    for key, wanted_size in (("height", shapes.latent_h * VAE_SPATIAL), ("width", shapes.latent_w * VAE_SPATIAL)):
        if meta[key] != wanted_size:
            return Problem(key, f"{meta[key]}, but the handshake agreed on {wanted_size}", "22")
    if meta["current_start_frame"] < 0:
        return Problem("current_start_frame", f"{meta['current_start_frame']} is below 0", "22")
    return None


def specs_problem(
    meta: Mapping[str, Any], specs: Sequence[TensorSpec], tp_plan: str, shapes: Shapes, wire: Dialect
) -> Problem | None:
    """Specs against the schema, before anything is allocated. `meta` passed `meta_problem`.

    Raises:
        CallCountError: the step list's length is not the number of steps (FM-02).
    """
    steps_key = wire.meta["num_denoise_steps"]
    steps = meta[steps_key]
    if not 1 <= steps <= MAX_STEPS:
        return Problem(steps_key, f"{steps} is outside 1..{MAX_STEPS}", "22")
    wanted = shapes.expected(
        tp_plan,
        num_steps=steps,
        do_kv_recompute=meta[wire.meta["do_kv_recompute"]],
        current_start_frame=meta["current_start_frame"],
    )
    found = {(spec.key, spec.index): spec for spec in specs}
    step_list = found.get((wire.tensor[STEPS], 0))
    if step_list is not None and step_list.shape != (steps,):
        raise CallCountError(
            f"{steps_key} is {steps}, but {step_list.key} has the shape {list(step_list.shape)}",
            code="TP-6102",
            evidence={"num_denoise_steps": steps, "shape": step_list.shape},
        )
    for name, shape_dtype in wanted.items():
        key = wire.tensor[name]
        spec = found.pop((key, 0), None)
        if shape_dtype is None:
            if spec is not None:
                return Problem(key, "carried, but recompute is not planned", "17", "FM-01")
        elif spec is None:
            return Problem(key, f"missing under {tp_plan}", "16", "FM-06")
        else:
            problem = spec_problem(spec, *shape_dtype)
            if problem is not None:
                return problem
    if found:
        key, index = min(found)
        return Problem(key, f"tensor {index} is not expected under {tp_plan}", "17")
    return None


def spec_problem(spec: TensorSpec, shape: tuple[int, ...], dtype: str) -> Problem | None:
    """One spec against what its tensor must be."""
    if spec.shape != shape:
        return Problem(spec.key, f"shape {list(spec.shape)}, expected {list(shape)}", "18")
    if spec.dtype != dtype:
        return Problem(spec.key, f"dtype {spec.dtype}, expected {dtype}", "19", "FM-07")
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
        problem = tensor_problem(name, tensor, shape_dtype, device)
        if problem is not None:
            return problem
    held = tensors[STEPS]
    if held is not None and held.tolist() != list(plan.denoising_step_list):
        return Problem(
            STEPS, f"the tensor holds {held.tolist()}, the plan {list(plan.denoising_step_list)}", "23", "FM-01"
        )
    return None


def tensor_problem(name: str, tensor: Any, wanted: tuple[tuple[int, ...], str], device: str) -> Problem | None:
    """One tensor in memory against the shape and dtype that it must have, and where its bytes must be."""
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
