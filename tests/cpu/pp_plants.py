"""What breaks a rank of a pp job, for `start_ranks`: each function plants one thing in its rank."""

from __future__ import annotations

import dataclasses
import json
import threading
from typing import Any

import torch

from engine.comm import parity
from engine.comm.p2p import LeaderEnd, Stage0End
from engine.config import EngineConfig
from engine.errors import SinkError
from engine.faults.acts import put, reseal
from engine.faults.scene import Method, wrap
from engine.recorder import Recorder
from engine.stage0 import Stage0
from engine.stage1 import MeshResult, Stage1
from engine.wire.envelope import Envelope
from engine.wire.frame import PreparedFrame
from engine.wire.header import Action
from engine.wire.meta import encode_plain
from engine.wire.result import Result

AT_CHUNK = 2
FAR_S = 600.0  # beyond every deadline of a test
FLYING_S = 60.0


def blind_to_geometry() -> None:
    """The comparison of configurations does not see geometry: what is left is the shape handshake."""

    def make(observe: Method) -> Method:
        def observed(config: EngineConfig) -> dict[str, str]:
            return {key: value for key, value in observe(config).items() if "geometry" not in key}

        return observed

    wrap(parity, "launch_observation", make)


def add_vace_frames() -> None:
    """Stage 0 adds a tensor that no contract has."""

    def make(link: Method) -> Method:
        def linked(stage0: Stage0, envelope: Envelope) -> Envelope:
            made = link(stage0, envelope)
            if made.plan.chunk_index != AT_CHUNK:
                return made
            return dataclasses.replace(made, tensors={**made.tensors, "vace_frames": torch.zeros(1, 3, 4, 4)})

        return linked

    wrap(Stage0, "for_link", make)


def send_vace() -> None:
    """A Stage 0 of another build, whose envelopes may bring VACE: only the leader can refuse them."""

    def forge(frame: PreparedFrame) -> None:
        meta = json.loads(frame.meta)
        meta["envelope"]["pp_disable_vace"] = False
        raw = encode_plain(meta)
        put(frame, "meta", raw)
        reseal(meta_bytes=len(raw))(frame)

    def make(post: Method) -> Method:
        def posted(end: Stage0End, frame: PreparedFrame) -> None:
            if frame.header.action is Action.INFER and frame.header.chunk_index == AT_CHUNK:
                forge(frame)
            post(end, frame)

        return posted

    wrap(Stage0End, "post", make)


def answer_smaller() -> None:
    """A leader that believes in another size, and answers in it."""

    def make(answer: Method) -> Method:
        def answered(end: LeaderEnd, result: Result) -> None:
            if result.chunk_index == AT_CHUNK and result.latents_out_BFCHW is not None:
                end.shapes = dataclasses.replace(end.shapes, latent_h=end.shapes.latent_h - 1)
                result = dataclasses.replace(result, latents_out_BFCHW=result.latents_out_BFCHW[..., 1:, :])
            answer(end, result)

        return answered

    wrap(LeaderEnd, "answer", make)


def never_answer() -> None:
    """A mesh that goes into a chunk and does not come back."""

    def make(step: Method) -> Method:
        def stuck(stage1: Stage1, envelope: Envelope, call_id: int) -> MeshResult:
            if envelope.plan.chunk_index == AT_CHUNK + 1:
                threading.Event().wait(FAR_S)
            made: MeshResult = step(stage1, envelope, call_id)
            return made

        return stuck

    wrap(Stage1, "step", make)


def fail_to_record() -> None:
    """Stage 0's own loop fails while the chunk after is under way."""
    under_way = threading.Event()

    def make_post(post: Method) -> Method:
        def posted(end: Stage0End, frame: PreparedFrame) -> None:
            post(end, frame)
            if frame.header.chunk_index == AT_CHUNK + 1:
                under_way.set()

        return posted

    def make_keep(keep: Method) -> Method:
        def kept(recorder: Recorder, chunk_index: int, *tensors: Any) -> None:
            if chunk_index == AT_CHUNK:
                assert under_way.wait(FLYING_S)
                raise SinkError("planted: the disk is full")
            keep(recorder, chunk_index, *tensors)

        return kept

    wrap(Stage0End, "post", make_post)
    wrap(Recorder, "keep", make_keep)
