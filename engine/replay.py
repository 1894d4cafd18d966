"""Replays recorded frames on one process, with all heads, and takes the samples that each rank took.

    python -m engine.replay --config RUN/config.toml --run-dir RUN --out DIR [--job NAME] [--tied]

Writes `DIR/chunk_00000.samples`..., reads `RUN/frames`, and changes nothing in the run. One JSON object a line on
stdout: `start` (what it replays with), then for each frame `chunk` (replayed) or `skip` (why not), then `end`; `error`
if it had to give up. A chunk whose predecessor cannot be replayed has no cache to stand on: it is skipped, up to the
next hard cut.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine import config as configuration
from engine.blackbox import BlackBox
from engine.comm.group import Group, Phase
from engine.comm.topology import effective_device
from engine.config import EngineConfig
from engine.errors import EngineError
from engine.evidence import Evidence
from engine.model.attention import resolve_backend
from engine.model.loader import build_generator
from engine.plan import V1
from engine.sampling import KVSampler
from engine.sealed import REPLAY_RANK, Kind, SealedError, chunks_in, frame_path, frames_dir, read_sealed
from engine.stage1 import Stage1
from engine.wire.envelope import Envelope, Shapes
from engine.wire.frame import check_specs, parse_meta, rebuild
from engine.wire.header import HEADER_BYTES, Action, Header, Limits, LinkState, parse_header

_IDS = struct.Struct("<4q")  # call_id, chunk_index, cache_epoch, control_epoch: words 3 to 6 of a header
_IDS_OFFSET = 3 * 8


class ReplayError(EngineError):
    """A chunk that cannot be replayed; the message says why."""

    code = "TP-6231"
    next_step = "tpctl kv-audit RUN_DIR"


@dataclass(frozen=True)
class Recorded:
    """One recorded frame, through all of the receiver's checks."""

    header: Header
    envelope: Envelope


class FrameReader:
    """Reads frames in order as a receiver would, and starts anew at a hard cut after a gap."""

    def __init__(self, run_dir: Path, config: EngineConfig, job: str | None, device: str) -> None:
        self.job = job
        self._run_dir = run_dir
        self._shapes = Shapes.of(config)
        self._limits = Limits.of(config)
        self._device = device
        self._link: LinkState | None = None  # None: the next frame must begin an epoch

    def gap(self) -> None:
        """What comes next has no cache to stand on."""
        self._link = None

    def read(self, chunk_index: int) -> Recorded:
        """The frame of one chunk.

        Raises:
            EngineError: the file or the frame is refused, or it follows a gap; `gap` holds from then on.
        """
        link, self._link = self._link, None
        seal, raw = read_sealed(frame_path(self._run_dir, chunk_index), Kind.FRAME)
        self.job = self.job or seal.job
        if seal.job != self.job or seal.chunk_index != chunk_index:
            raise SealedError(f"chunk {chunk_index}'s frame is of job {seal.job}, chunk {seal.chunk_index}")
        resuming = link is None or link.last_chunk_index != chunk_index - 1
        if link is None or resuming:
            link = _seat(raw)
        header = parse_header(raw[:HEADER_BYTES], link, self._limits, accept=frozenset({Action.INFER}))
        if header.chunk_index != chunk_index:
            raise SealedError(f"chunk {chunk_index}'s frame says it is chunk {header.chunk_index}")
        end = HEADER_BYTES + header.meta_bytes
        meta = parse_meta(header, raw[HEADER_BYTES:end])
        specs = check_specs(header, meta, shapes=self._shapes, tp_plan=V1, link=None if resuming else link)
        if resuming and not meta["envelope"]["init_cache"]:
            raise ReplayError(f"chunk {chunk_index} stands on a cache that cannot be replayed; it is no hard cut")
        payload = torch.frombuffer(bytearray(raw[end:]), dtype=torch.uint8).to(self._device)
        envelope = rebuild(header, meta, payload, shapes=self._shapes, tp_plan=V1, specs=specs)
        link.advance(header)
        self._link = link
        return Recorded(header, envelope)


def _seat(raw: bytes) -> LinkState:
    """The state of a link that has seen everything before this frame; `parse_header` judges the frame itself."""
    if len(raw) < HEADER_BYTES:
        raise SealedError(f"a frame of {len(raw)} bytes has no header")
    call_id, chunk_index, cache_epoch, control_epoch = _IDS.unpack_from(raw, _IDS_OFFSET)
    return LinkState(call_id - 1, chunk_index - 1, cache_epoch, control_epoch)


class Replay:
    """One process with all heads: a mesh of one, which waits for nobody."""

    def __init__(self, config: EngineConfig, run_dir: Path, out: Path, job: str | None) -> None:
        self.config = config = alone(config)
        self.run_dir = run_dir
        device = effective_device(config)
        backend, _ = resolve_backend(config.model.attention_backend, device, config.model.dtype)
        mesh = Group.solo()
        mesh.gate.phase = Phase.LINK
        generator = build_generator(config, mesh, backend, device)
        box = BlackBox(out / "replay.blackbox", 0)
        self.stage1 = Stage1(generator.dit, generator.kv, generator.cross, mesh, config, box)
        self.frames = FrameReader(run_dir, config, job, device)
        self.facts = {
            "device": device,
            "dtype": config.model.dtype,
            "attention_backend": backend,
            "replicated_fingerprint": generator.replicated_fingerprint,
        }
        self._out = out

    def run(self) -> None:
        """Every frame there is, in order.

        Raises:
            EngineError: the samples cannot be written.
        """
        chunks = chunks_in(frames_dir(self.run_dir), ".frame")
        say("start", frames=len(chunks), **self.facts)
        evidence: Evidence | None = None
        for chunk_index in chunks:
            started = time.perf_counter()
            try:
                recorded = self.frames.read(chunk_index)
                if evidence is None:
                    sampler = KVSampler(0, self.config.dims.num_heads)
                    evidence = Evidence(self._out, self.frames.job or "", REPLAY_RANK, sampler, self._give_up)
                self.stage1.evidence = evidence
                result = self.stage1.step(recorded.envelope, recorded.header.call_id)
            except EngineError as error:
                if error.code == GiveUp.code:
                    raise
                self.frames.gap()
                say("skip", chunk_index=chunk_index, code=error.code, reason=error.message)
            else:
                took_s = time.perf_counter() - started
                calls = result.observed_generator_calls
                say("chunk", **recorded.header.ids(), calls=calls, took_s=round(took_s, 4))
        say("end")

    def _give_up(self, reason: str) -> None:
        """Unlike a rank, a replay without samples has no purpose."""
        raise GiveUp(reason)


class GiveUp(EngineError):
    code = "TP-6232"
    next_step = "make room in the temporary directory (TMPDIR), then repeat the audit"


def alone(config: EngineConfig) -> EngineConfig:
    """The same stream on a mesh of one: complete envelopes, no drill, no evidence of its own."""
    data: dict[str, Any] = config.to_dict()
    data["plan"] |= {"tp": 1, "tp_plan": V1}
    data["model"] |= {"compile": "off"}
    data["drill"] = {}
    return configuration.from_dict(data)


def say(event: str, **facts: Any) -> None:
    print(json.dumps({"event": event, **facts}), flush=True)


def _end_with_stdin() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="engine.replay", description="Replay recorded frames on one process.")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--job", help="refuse frames of any other job; default: the job of the first frame")
    parser.add_argument("--tied", action="store_true", help="end when stdin does: with whoever started this process")
    arguments = parser.parse_args(argv)
    if arguments.tied:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        if not arguments.out.is_dir():  # whoever asked may have gone, and taken it along
            raise ReplayError(f"there is no directory {arguments.out}")
        config = configuration.load([("run", arguments.config)]).config
        Replay(config, arguments.run_dir, arguments.out, arguments.job).run()
    except EngineError as error:
        say("error", **error.to_record())
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
