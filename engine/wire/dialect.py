"""The names of one chunk's values on both wires (contract, section 7). No other module knows which name is which.

In memory a value has one name: an attribute of `ChunkPlan`, or a tensor's. The TP wire runs from the mesh leader to
the mesh, the pp wire from Stage 0 to the mesh leader; a `Dialect` is one of the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from engine.wire.header import Schema

TP_ENVELOPE_VERSION = 1
PP_ENVELOPE_VERSION = 1
PP_V2V_ENVELOPE_VERSION = 2  # as version 1, and noise_scale may be a number

LATENTS = "latents"
RENOISE = "renoise"
CONDITIONING = "conditioning_embeds"
STEPS = "denoising_step_list"
CONTEXT = "context_frames"


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
    Name("noise_scale", "noise_scale", "noise_scale", "share"),
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
DISABLE_VACE = "pp_disable_vace"


@dataclass(frozen=True)
class Dialect:
    """How one of the two wires spells a chunk: the only place that knows which name is which.

    `meta` maps `ChunkPlan` attributes, `tensor` in-memory tensor names, to the names on the wire. `plan_key` names the
    plan on the TP wire; the pp wire does not say it, since its two ends are one pair of parties.
    """

    schema: Schema
    version_key: str
    version: int
    plan_key: str | None
    constants: Mapping[str, bool]
    v2v: bool
    meta: Mapping[str, str]
    tensor: Mapping[str, str]
    kinds: Mapping[str, str]

    @classmethod
    def of(cls, column: str, schema: Schema, version: int, constants: Mapping[str, bool], *, v2v: bool) -> Dialect:
        return cls(
            schema=schema,
            version_key=f"{column}_envelope_version",
            version=version,
            plan_key="tp_plan" if column == "tp" else None,
            constants=MappingProxyType(dict(constants)),
            v2v=v2v,
            meta=MappingProxyType({name.attribute: getattr(name, column) for name in META_NAMES}),
            tensor=MappingProxyType({memory: names[column == "pp"] for memory, names in TENSOR_NAMES.items()}),
            kinds=MappingProxyType({getattr(name, column): name.kind for name in META_NAMES}),
        )

    @property
    def nullable(self) -> str:
        """The one tensor that is an explicit null where it is not planned."""
        return self.tensor[CONTEXT]


TP = Dialect.of("tp", Schema.TP_ENVELOPE, TP_ENVELOPE_VERSION, {}, v2v=True)
# VACE has no contract between the two pp parties yet: the sender says so, or is refused. Video-to-video has one in a
# version of its own, so that a party of version 1 refuses it by version, and a stream without it is as it always was.
PP = Dialect.of("pp", Schema.PP_ENVELOPE, PP_ENVELOPE_VERSION, {DISABLE_VACE: True}, v2v=False)
PP_V2V = Dialect.of("pp", Schema.PP_ENVELOPE, PP_V2V_ENVELOPE_VERSION, {DISABLE_VACE: True}, v2v=True)


def pp_wire(noise_scale: float | None) -> Dialect:
    """What both ends of the pp link speak in a job, by its configuration: one version for all of the job."""
    return PP if noise_scale is None else PP_V2V
