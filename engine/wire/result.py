"""PPResultV1: what the mesh leader answers to one envelope, and its schema (contract, section 7).

B batch (1), F frames a chunk, C latent channels, h w latent height and width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.wire.envelope import Shapes, spec_problem, tensor_problem
from engine.wire.header import Header
from engine.wire.problem import Problem
from engine.wire.specs import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

PP_RESULT_VERSION = 1
LATENTS_OUT = "latents_out"
_MESSAGE_CHARS = 4096


@dataclass(frozen=True)
class Result:
    """The answer to the envelope of the same ids. `latents_out_BFCHW` is there exactly if `ok`.

    Times in milliseconds: `t_b_ms` phase B, `t_mesh_idle_ms` from the last answer to the start of this phase B.
    """

    call_id: int
    chunk_index: int
    cache_epoch: int
    control_epoch: int
    ok: bool
    error_code: str | None
    error_message: str | None
    observed_generator_calls: int
    mesh_current_start_frame: int
    output_digest_i64: int
    t_b_ms: float
    t_mesh_idle_ms: float
    latents_out_BFCHW: Tensor | None = None

    def ids(self) -> dict[str, int]:
        return {"call_id": self.call_id, "chunk_index": self.chunk_index, "cache_epoch": self.cache_epoch}

    @classmethod
    def failed(cls, ids: Mapping[str, int], control_epoch: int, code: str, message: str) -> Result:
        """An error result: nothing was made, and why. It never fails to be made."""
        return cls(
            call_id=ids.get("call_id", -1),
            chunk_index=ids.get("chunk_index", -1),
            cache_epoch=ids.get("cache_epoch", 0),
            control_epoch=control_epoch,
            ok=False,
            error_code=code,
            error_message=message[:_MESSAGE_CHARS].encode(errors="replace").decode() or code,
            observed_generator_calls=0,
            mesh_current_start_frame=0,
            output_digest_i64=0,
            t_b_ms=0.0,
            t_mesh_idle_ms=0.0,
        )


_TYPES: Mapping[str, tuple[type, ...]] = {
    "ok": (bool,),
    "error_code": (str, type(None)),
    "error_message": (str, type(None)),
    "observed_generator_calls": (int,),
    "mesh_current_start_frame": (int,),
    "output_digest_i64": (int,),
    "t_b_ms": (int, float),
    "t_mesh_idle_ms": (int, float),
}
_NOT_NEGATIVE = ("observed_generator_calls", "mesh_current_start_frame", "t_b_ms", "t_mesh_idle_ms")
_VERSION = "pp_result_version"


def result_meta(result: Result) -> dict[str, Any]:
    """The result as plain data, its latents aside. The ids travel in the header."""
    return {name: getattr(result, name) for name in _TYPES} | {_VERSION: PP_RESULT_VERSION}


def result_from_meta(meta: Mapping[str, Any], latents_BFCHW: Tensor | None, header: Header) -> Result:
    """The inverse of `result_meta`, for a meta that passed `result_meta_problem`."""
    return Result(
        call_id=header.call_id,
        chunk_index=header.chunk_index,
        cache_epoch=header.cache_epoch,
        control_epoch=header.control_epoch,
        latents_out_BFCHW=latents_BFCHW,
        **{name: meta[name] for name in _TYPES},
    )


def result_meta_problem(meta: Mapping[str, Any]) -> Problem | None:
    """Keys, types and ranges, and that a failure says why while a success says nothing of the kind."""
    version = meta.get(_VERSION)
    if type(version) is not int or version != PP_RESULT_VERSION:
        return Problem(_VERSION, f"{version!r}; this build speaks {PP_RESULT_VERSION}", "11")
    for name, types in _TYPES.items():
        if name not in meta:
            return Problem(name, "missing in a result", "16", "FM-06")
        if type(meta[name]) not in types:
            return Problem(name, f"{meta[name]!r} is no value for it", "32")
    extra = sorted(meta.keys() - _TYPES.keys() - {_VERSION})
    if extra:
        return Problem(extra[0], "not expected in a result", "17")
    for name in _NOT_NEGATIVE:
        if not (math.isfinite(meta[name]) and meta[name] >= 0):
            return Problem(name, f"{meta[name]!r} is below 0", "32")
    for name in ("error_code", "error_message"):
        if (meta[name] is None) != meta["ok"]:
            return Problem(name, f"{meta[name]!r} with ok = {str(meta['ok']).lower()}", "32")
    return None


def result_specs_problem(meta: Mapping[str, Any], specs: Sequence[TensorSpec], shapes: Shapes) -> Problem | None:
    """A good result carries its latents, an error result nothing. `meta` passed `result_meta_problem`."""
    if not meta["ok"]:
        return Problem(specs[0].key, "not expected in an error result", "17") if specs else None
    for spec in specs:
        if (spec.key, spec.index) != (LATENTS_OUT, 0):
            return Problem(spec.key, f"tensor {spec.index} is not expected in a result", "17")
    if not specs:
        return Problem(LATENTS_OUT, "missing in a result", "16", "FM-06")
    return spec_problem(specs[0], *shapes.latents())


def latents_problem(result: Result, shapes: Shapes, device: str) -> Problem | None:
    """The latents in memory against the schema."""
    latents_BFCHW = result.latents_out_BFCHW
    if not result.ok:
        return Problem(LATENTS_OUT, "not expected in an error result", "17") if latents_BFCHW is not None else None
    if latents_BFCHW is None:
        return Problem(LATENTS_OUT, "missing in a result", "16", "FM-06")
    return tensor_problem(LATENTS_OUT, latents_BFCHW, shapes.latents(), device)
