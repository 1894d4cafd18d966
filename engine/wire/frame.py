"""Frames: everything that can fail on the sender (`prepare`), and everything the receiver checks (`rebuild`).

    sender    prepare(envelope) -> PreparedFrame -> transport sends header_bytes, meta, payload
    receiver  parse_header -> parse_meta -> check_specs -> payload received -> rebuild -> link.advance

A transport takes a `PreparedFrame` only, and only this module can make one: what was not checked cannot be sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from engine.errors import CallCountError, PreflightError
from engine.wire.dialect import TP, Dialect
from engine.wire.envelope import (
    CARRIES,
    Envelope,
    Shapes,
    envelope_from_meta,
    envelope_meta,
    meta_problem,
    specs_problem,
    tensors_problem,
)
from engine.wire.header import Action, Header, Limits, LinkState, Schema, size_problem
from engine.wire.meta import encode_meta, encode_plain, error_meta_problem, find_problem, parse_meta
from engine.wire.problem import Problem
from engine.wire.result import (
    LATENTS_OUT,
    PP_RESULT_VERSION,
    Result,
    latents_problem,
    result_from_meta,
    result_meta,
    result_meta_problem,
    result_specs_problem,
)
from engine.wire.specs import ALIGNMENT, ITEM_BYTES, TensorSpec, layout, read_specs

__all__ = [
    "PayloadBuffer",
    "PreparedFrame",
    "check_result",
    "check_specs",
    "parse_meta",
    "prepare",
    "prepare_control",
    "prepare_result",
    "rebuild",
    "rebuild_result",
    "tensor_specs",
]

_DTYPES: Mapping[str, torch.dtype] = {name: getattr(torch, name) for name in ITEM_BYTES}
_TOKEN = object()


class PayloadBuffer:
    """One growing, reused allocation for payloads. A view is valid until the next one is taken.

    Args:
        device: where the bytes live.
        pin: page-locked host memory, for copies to and from a CUDA device.
    """

    def __init__(self, device: str | torch.device = "cpu", pin: bool = False) -> None:
        self.device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        self.generation = 0
        self._pin = pin
        self._bytes = torch.empty(0, dtype=torch.uint8, device=self.device)

    @property
    def capacity(self) -> int:
        """Bytes held."""
        return self._bytes.numel()

    def view(self, nbytes: int) -> Tensor:
        """A uint8 tensor [nbytes] at the start of the buffer. `nbytes` has passed the limits."""
        if nbytes > self.capacity:
            # A buffer born in inference mode could not be written outside it.
            with torch.inference_mode(False):
                self._bytes = torch.empty(nbytes, dtype=torch.uint8, device=self.device, pin_memory=self._pin)
        self.generation += 1
        return self._bytes[:nbytes]


@dataclass(frozen=True)
class PreparedFrame:
    """A frame that passed every check. Made by `prepare` and `prepare_control` alone.

    Its payload lies in the buffer it was prepared in, so preparing another frame there makes this one `stale`.

    Raises:
        PreflightError: on construction by anybody else.
    """

    header: Header
    header_bytes: bytes
    meta: bytes
    payload: Tensor | None
    buffer: PayloadBuffer | None = None
    generation: int = 0
    token: InitVar[object] = None

    def __post_init__(self, token: object) -> None:
        if token is not _TOKEN:
            raise PreflightError("a PreparedFrame is made by prepare or prepare_control only", code="TP-2127")

    @property
    def stale(self) -> bool:
        """True once the buffer was used again: the payload is no longer the one that was checked."""
        return self.buffer is not None and self.buffer.generation != self.generation

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        return len(self.header_bytes) + len(self.meta) + (0 if self.payload is None else self.payload.numel())


@torch.no_grad()
def prepare(
    envelope: Envelope,
    *,
    call_id: int,
    link: LinkState,
    shapes: Shapes,
    limits: Limits,
    buffer: PayloadBuffer,
    wire: Dialect = TP,
) -> PreparedFrame:
    """Check one INFER envelope to the end, and pack it. Whatever can fail fails here, before a byte is sent.

    Args:
        envelope: the chunk.
        call_id: above every earlier one on this link.
        link: what this end last sent; not advanced.
        shapes: sizes agreed at start-up.
        limits: bounds of the frame.
        buffer: where the payload is written; its device is the device of every tensor.
        wire: whose names and schema.

    Raises:
        PreflightError: any problem, named by key path or tensor.
        CallCountError: the plan's steps and calls disagree (FM-02).
    """
    plan = envelope.plan
    body = envelope_meta(envelope, wire)
    problem = _identity_problem(envelope, call_id) or find_problem(body, "envelope")
    if problem is not None:
        raise problem.preflight()
    ids = plan.ids(call_id)
    problem = meta_problem(body, envelope.tp_plan, shapes, wire)
    # The plan goes before the tensors, since their shapes follow from it.
    if problem is None:
        plan.check(call_id)
        problem = tensors_problem(envelope, shapes, str(buffer.device))
    if problem is not None:
        raise problem.preflight(ids)
    tensors = {wire.tensor[name]: tensor for name, tensor in envelope.tensors.items() if tensor is not None}
    header = Header(
        action=Action.INFER,
        call_id=call_id,
        chunk_index=plan.chunk_index,
        cache_epoch=plan.cache_epoch,
        control_epoch=plan.control_epoch,
        schema=wire.schema,
        schema_version=wire.version,
        meta_bytes=0,
        tensor_count=0,
        payload_bytes=0,
        meta_checksum=0,
    )
    problem = link.problem(header) or link.cut_problem(header, plan.init_cache)
    if problem is not None:
        raise problem.preflight(ids)
    return _pack(header, "envelope", body, tensors, limits, buffer)


@torch.no_grad()
def prepare_result(
    result: Result, *, link: LinkState, shapes: Shapes, limits: Limits, buffer: PayloadBuffer
) -> PreparedFrame:
    """Check one RESULT to the end, and pack it. It answers the envelope whose ids it carries.

    An error result has no tensors and must always be possible: whatever its ids are, they are those of an answer.

    Raises:
        PreflightError: any problem, named by key or tensor.
    """
    ids = result.ids()
    body = result_meta(result)
    problem = find_problem(body, "result") or result_meta_problem(body)
    if problem is None:
        problem = latents_problem(result, shapes, str(buffer.device))
    if problem is not None:
        raise problem.preflight(ids)
    header = Header(
        action=Action.RESULT,
        call_id=result.call_id,
        chunk_index=result.chunk_index,
        cache_epoch=result.cache_epoch,
        control_epoch=result.control_epoch,
        schema=Schema.PP_RESULT,
        schema_version=PP_RESULT_VERSION,
        meta_bytes=0,
        tensor_count=0,
        payload_bytes=0,
        meta_checksum=0,
    )
    problem = link.problem(header) if result.ok else None
    if problem is not None:
        raise problem.preflight(ids)
    tensors = {LATENTS_OUT: result.latents_out_BFCHW} if result.latents_out_BFCHW is not None else {}
    return _pack(header, "result", body, tensors, limits, buffer)


def _pack(
    header: Header,
    part: str,
    body: dict[str, Any],
    tensors: Mapping[str, Tensor],
    limits: Limits,
    buffer: PayloadBuffer,
) -> PreparedFrame:
    """Meta, specs and payload of checked parts; `header` holds the ids, its sizes are filled in here.

    Raises:
        PreflightError: the sizes are beyond the limits.
    """
    sources = sorted(tensors.items())
    specs = [TensorSpec(key, 0, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for key, t in sources]
    offsets, payload_bytes = layout(specs)
    meta = encode_plain({part: body, "tensor_specs": [spec.to_row() for spec in specs]})
    header = replace(header, meta_bytes=len(meta), tensor_count=len(specs), payload_bytes=payload_bytes)
    problem = size_problem(header, limits)
    if problem is not None:
        raise problem.preflight(header.ids())
    header = header.seal(meta)
    if not specs:
        return PreparedFrame(header, header.pack(), meta, None, token=_TOKEN)
    payload = buffer.view(payload_bytes)
    for (_, tensor), spec, offset in zip(sources, specs, offsets, strict=True):
        end = offset + spec.nbytes
        place = payload[offset:end].view(tensor.dtype)
        if tensor.is_contiguous():
            place.copy_(tensor.view(-1))  # one run on both sides: the fastest copy
        else:
            place.view(spec.shape).copy_(tensor)
        if end % ALIGNMENT:
            payload[end : end + -end % ALIGNMENT].zero_()
    return PreparedFrame(header, header.pack(), meta, payload, buffer, buffer.generation, _TOKEN)


def prepare_control(
    action: Action,
    *,
    call_id: int,
    link: LinkState,
    meta: dict[str, Any] | None = None,
    limits: Limits | None = None,
) -> PreparedFrame:
    """A NOOP or SHUTDOWN (header alone: one message), or an ERROR with its meta (see `meta.error_meta`).

    Raises:
        PreflightError: another action, a meta where none belongs, an incomplete one, or an id that may not follow.
    """
    is_error = action is Action.ERROR
    problem: Problem | None = None
    if action not in (Action.NOOP, Action.SHUTDOWN, Action.ERROR):
        problem = Problem("action", f"{action.name} is no control action", "05")
    elif is_error:
        problem = error_meta_problem(meta or {})
    elif meta is not None:
        problem = Problem("meta", f"{action.name} carries none", "17")
    if problem is not None:
        raise problem.preflight({"call_id": call_id})
    raw = encode_meta(meta) if meta is not None else b""
    header = Header(
        action=action,
        call_id=call_id,
        chunk_index=-1,
        cache_epoch=link.cache_epoch,
        control_epoch=link.control_epoch,
        schema=Schema.ERROR if is_error else Schema.NONE,
        schema_version=1 if is_error else 0,
        meta_bytes=len(raw),
        tensor_count=0,
        payload_bytes=0,
        meta_checksum=0,
    )
    problem = link.problem(header) or size_problem(header, limits or Limits())
    if problem is not None:
        raise problem.preflight(header.ids())
    header = header.seal(raw)
    return PreparedFrame(header, header.pack(), raw, None, token=_TOKEN)


def tensor_specs(meta: Mapping[str, Any], header: Header | None = None) -> list[TensorSpec]:
    """The validated specs of a meta; with a header, also against its tensor count and payload size.

    Raises:
        FrameError: malformed, unsorted, repeated, of an unknown dtype, or of other sizes than announced.
    """
    ids = header.ids() if header is not None else None
    specs = read_specs(meta.get("tensor_specs"))
    if isinstance(specs, Problem):
        raise specs.refusal(ids)
    if header is not None:
        if len(specs) != header.tensor_count:
            raise Problem("tensor_count", f"{header.tensor_count} announced, {len(specs)} described", "15").refusal(ids)
        total = layout(specs)[1]
        if total != header.payload_bytes:
            raise Problem("payload_bytes", f"{header.payload_bytes} announced, {total} described", "25").refusal(ids)
    return specs


def check_specs(
    header: Header,
    meta: Mapping[str, Any],
    *,
    shapes: Shapes,
    tp_plan: str,
    link: LinkState | None = None,
    wire: Dialect = TP,
) -> list[TensorSpec]:
    """Meta and specs against the schema. A transport calls it before it makes room for the payload.

    Args:
        header: from `parse_header`.
        meta: from `parse_meta`.
        shapes: sizes agreed at start-up.
        tp_plan: the plan this rank runs; the envelope must say the same.
        link: when given, not yet advanced: the epoch is held against `init_cache`.
        wire: whose names and schema.

    Raises:
        FrameError: the first thing wrong, by name.
        CallCountError: steps against step list (FM-02).
    """
    ids = header.ids()
    if set(meta) != {"envelope", "tensor_specs"} or type(meta["envelope"]) is not dict:
        raise Problem("meta", "INFER carries an envelope and tensor_specs, and nothing else", "22").refusal(ids)
    body = meta["envelope"]
    problem = meta_problem(body, tp_plan, shapes, wire)
    if problem is None and link is not None:
        problem = link.cut_problem(header, body["init_cache"])
    if problem is not None:
        raise problem.refusal(ids)
    specs = tensor_specs(meta, header)
    problem = specs_problem(body, specs, tp_plan, shapes, wire)
    if problem is not None:
        raise problem.refusal(ids)
    return specs


def rebuild(
    header: Header,
    meta: Mapping[str, Any],
    payload: Tensor | None,
    *,
    shapes: Shapes,
    tp_plan: str,
    link: LinkState | None = None,
    specs: Sequence[TensorSpec] | None = None,
    wire: Dialect = TP,
) -> Envelope:
    """The envelope of a received frame; its tensors are views of `payload`, so they live as long as its bytes do.

    Args:
        payload: uint8 [payload_bytes], at a multiple of 16 bytes in its storage.
        header, meta, shapes, tp_plan, link, wire: as for `check_specs`.
        specs: what `check_specs` returned for this very header and meta, to save doing it again.

    Raises:
        FrameError: specs, payload or the rebuilt envelope break the schema.
        CallCountError: planned, expected and computed calls differ (FM-02).
    """
    ids = header.ids()
    if specs is None:
        specs = check_specs(header, meta, shapes=shapes, tp_plan=tp_plan, link=link, wire=wire)
    problem = _payload_problem(payload, header)
    if problem is not None or payload is None:
        raise (problem or Problem("payload", "missing", "25")).refusal(ids)
    tensors = _views(payload, specs)
    envelope = envelope_from_meta(
        meta["envelope"],
        tensors,
        wire,
        tp_plan,
        chunk_index=header.chunk_index,
        cache_epoch=header.cache_epoch,
        control_epoch=header.control_epoch,
    )
    try:
        envelope.plan.check(header.call_id)
    except CallCountError:
        raise
    except PreflightError as error:
        raise Problem("plan", error.message, "24", error.fm).refusal(ids) from error
    problem = tensors_problem(envelope, shapes, str(payload.device))
    if problem is not None:
        raise problem.refusal(ids)
    return envelope


def check_result(header: Header, meta: Mapping[str, Any], *, shapes: Shapes) -> list[TensorSpec]:
    """Meta and specs of a RESULT against the schema, before room is made for its payload.

    Raises:
        FrameError: the first thing wrong, by name.
    """
    ids = header.ids()
    if set(meta) != {"result", "tensor_specs"} or type(meta["result"]) is not dict:
        raise Problem("meta", "RESULT carries a result and tensor_specs, and nothing else", "22").refusal(ids)
    problem = result_meta_problem(meta["result"])
    if problem is not None:
        raise problem.refusal(ids)
    specs = tensor_specs(meta, header)
    problem = result_specs_problem(meta["result"], specs, shapes)
    if problem is not None:
        raise problem.refusal(ids)
    return specs


def rebuild_result(
    header: Header, meta: Mapping[str, Any], payload: Tensor | None, *, shapes: Shapes, specs: Sequence[TensorSpec]
) -> Result:
    """The result of a received frame; its latents are a view of `payload`. `specs` is what `check_result` returned.

    Raises:
        FrameError: the payload is not what was announced.
    """
    latents_BFCHW = None
    if specs:
        problem = _payload_problem(payload, header)
        if problem is not None or payload is None:
            raise (problem or Problem("payload", "missing", "25")).refusal(header.ids())
        latents_BFCHW = _views(payload, specs)[LATENTS_OUT]
    return result_from_meta(meta["result"], latents_BFCHW, header)


def _views(payload: Tensor, specs: Sequence[TensorSpec]) -> dict[str, Tensor]:
    offsets, _ = layout(specs)
    return {
        spec.key: payload[offset : offset + spec.nbytes].view(_DTYPES[spec.dtype]).view(spec.shape)
        for spec, offset in zip(specs, offsets, strict=True)
    }


def _payload_problem(payload: Tensor | None, header: Header) -> Problem | None:
    if payload is None or payload.dtype is not torch.uint8 or payload.dim() != 1 or not payload.is_contiguous():
        return Problem("payload", "not one run of bytes", "25")
    if payload.numel() != header.payload_bytes:
        return Problem("payload", f"{payload.numel()} bytes received, {header.payload_bytes} announced", "25")
    if payload.storage_offset() % ALIGNMENT:
        return Problem("payload", f"not at a multiple of {ALIGNMENT} bytes", "20")
    return None


def _identity_problem(envelope: Envelope, call_id: int) -> Problem | None:
    """Values that travel in the header or as a tensor, so that the scan of the meta does not see them."""
    plan = envelope.plan
    for name, value in (
        ("call_id", call_id),
        ("chunk_index", plan.chunk_index),
        ("cache_epoch", plan.cache_epoch),
        ("control_epoch", plan.control_epoch),
    ):
        if type(value) is not int or not -1 <= value < 1 << 63:
            return Problem(name, f"{value!r} is not a 64-bit whole number from -1", "22")
    steps = plan.denoising_step_list
    if type(steps) is not tuple or any(type(step) is not int for step in steps):
        return Problem("denoising_step_list", "the plan's list must be whole numbers", "22")
    if type(envelope.tp_plan) is str and envelope.tp_plan not in CARRIES:
        return Problem("tp_plan", f"{envelope.tp_plan!r} is unknown", "21", "FM-01")
    return None
