"""Evidence for a deep KV audit: each chunk's frame, and samples of the cache after each of its generator calls.

Off unless `run.record_frames` asks for it. The mesh leader keeps the frames, in the schema that carries everything:
under a plan that sends less, or on another wire, the completed envelope. Every mesh rank keeps samples of its heads.
Keeping them never harms the job: a full disk ends the keeping, not the rank, and the rank says so once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from engine.comm.group import Group
from engine.config import EngineConfig
from engine.errors import EngineError
from engine.model.kv_cache import CrossAttnCache, KVCache
from engine.plan import V1
from engine.sampling import KVSampler
from engine.sealed import Kind, Seal, frame_path, frames_dir, make_empty, samples_dir, samples_path, write_sealed
from engine.wire.envelope import Envelope, Shapes
from engine.wire.frame import PayloadBuffer, prepare
from engine.wire.header import Limits, LinkState


class FrameKeeper:
    """Stores each INFER frame: header, meta and payload, byte for byte as `prepare` makes them for v1.1c."""

    def __init__(self, run_dir: Path, job: str, rank: int, config: EngineConfig, device: str) -> None:
        self._run_dir = run_dir
        self._job = job
        self._rank = rank
        self._link = LinkState()
        self._shapes = Shapes.of(config)
        self._limits = Limits.of(config)
        self._buffer = PayloadBuffer(device)
        make_empty(frames_dir(run_dir), ".frame")

    def keep(self, envelope: Envelope, call_id: int) -> None:
        """Raises OSError if the disk refuses, EngineError if the envelope does."""
        whole = dataclasses.replace(envelope, tp_plan=V1, prompt=None)
        frame = prepare(
            whole, call_id=call_id, link=self._link, shapes=self._shapes, limits=self._limits, buffer=self._buffer
        )
        self._link.advance(frame.header)
        payload = b"" if frame.payload is None else frame.payload.cpu().numpy().tobytes()
        chunk_index = envelope.plan.chunk_index
        seal = Seal(Kind.FRAME, self._job, self._rank, chunk_index)
        write_sealed(frame_path(self._run_dir, chunk_index), seal, frame.header_bytes + frame.meta + payload)


class Evidence:
    """What phase B tells about itself, when asked: `begin` a chunk, each `call`, `end`.

    Args:
        directory: where this rank's samples go.
        rank: global, for the files' seal.
        warn: told once if keeping had to stop; nothing is ever raised to the rank.
    """

    def __init__(
        self,
        directory: Path,
        job: str,
        rank: int,
        sampler: KVSampler,
        warn: Callable[[str], None],
    ) -> None:
        self._directory = directory
        self._job = job
        self._rank = rank
        self._sampler = sampler
        self._warn = warn
        self._frames: FrameKeeper | None = None
        self._sampling = True
        self._facts: dict[str, int] = {}
        self._chunk_index = -1
        try:
            make_empty(directory, ".samples")
        except OSError as error:
            self._stop_samples(error, "from the start")

    @classmethod
    def of_rank(
        cls, run_dir: Path, job: str, config: EngineConfig, mesh: Group, device: str, warn: Callable[[str], None]
    ) -> Evidence:
        """For a rank of a job."""
        heads = config.dims.num_heads // mesh.size
        sampler = KVSampler(int(mesh.group_rank) * heads, config.dims.num_heads)
        evidence = cls(samples_dir(run_dir, mesh.rank), job, mesh.rank, sampler, warn)
        if mesh.is_leader:
            try:
                evidence._frames = FrameKeeper(run_dir, job, mesh.rank, config, device)
            except OSError as error:
                evidence._stop_frames(error, "from the start")
        return evidence

    def begin(self, envelope: Envelope, call_id: int) -> None:
        plan = envelope.plan
        self._chunk_index = plan.chunk_index
        self._facts = plan.ids(call_id) | {"calls": plan.expected_calls}
        if self._frames is not None:
            try:
                self._frames.keep(envelope, call_id)
            except (OSError, EngineError) as error:
                self._stop_frames(error, f"from chunk {plan.chunk_index} on")
        if self._sampling:
            self._sampler.begin(plan.chunk_index)

    def call(self, kv: KVCache, cross: CrossAttnCache) -> None:
        if self._sampling:
            self._sampler.call(kv, cross)

    def end(self) -> None:
        """After the last call. What a tripwire refuses later is still on disk."""
        if not self._sampling:
            return
        seal = Seal(Kind.SAMPLES, self._job, self._rank, self._chunk_index)
        try:
            write_sealed(
                samples_path(self._directory, self._chunk_index), seal, self._sampler.to_bytes({**self._facts})
            )
        except (OSError, torch.cuda.OutOfMemoryError) as error:
            self._stop_samples(error, f"from chunk {self._chunk_index} on")

    def _stop_frames(self, error: Exception, since: str) -> None:
        """For good: a stream with a gap cannot be replayed past it."""
        self._frames = None
        self._warn(f"no recorded frames {since}: {_why(error)}")

    def _stop_samples(self, error: Exception, since: str) -> None:
        self._sampling = False
        self._warn(f"no cache samples {since}: {_why(error)}")


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
