"""Recording and replay in one process: whole or refused, equal where nothing drifted, and any drift is in the sums."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load

from engine.blackbox import BlackBox
from engine.comm.group import Group, Phase
from engine.config import EngineConfig, from_dict
from engine.errors import EngineError
from engine.evidence import Evidence
from engine.materials import RANK0, Materials
from engine.model.kv_cache import KVCache
from engine.model.loader import build_generator
from engine.plan import TP_PLANS, V1
from engine.replay import FrameReader, Replay, alone
from engine.sampling import SAMPLED_TOKENS, KVSampler, places
from engine.sealed import Kind, Seal, SealedError, frame_path, read_sealed, samples_dir, samples_path, write_sealed
from engine.stage0 import Stage0
from engine.stage1 import Stage1
from engine.timeline import Event, Timeline
from engine.wire.envelope import Shapes
from engine.wire.frame import PayloadBuffer, prepare
from engine.wire.header import Limits, LinkState

JOB = "a" * 32
CUT = Timeline((Event(0, prompt="a boat on a lake"), Event(2, cut=True), Event(3, prompt="rain")))


def make_config(cache: Path, **dotted: Any) -> EngineConfig:
    base = {
        "model": {"cache_dir": str(cache)},
        "geometry": {"height": 32, "width": 32},
        "schedule": {"denoising_step_list": [1000, 500]},
        "run": {"record_frames": True},
    }
    return from_dict(base).replace(**dotted)


def record(config: EngineConfig, run_dir: Path, chunks: int = 4) -> list[Any]:
    """A job of one rank that keeps evidence; returns its complete envelopes."""
    run_dir.mkdir(parents=True, exist_ok=True)
    mesh = Group.solo()
    generator = build_generator(config, mesh, "sdpa", "cpu")
    stage1 = Stage1(generator.dit, generator.kv, generator.cross, mesh, config, BlackBox(run_dir / "box", 0))
    stage0 = Stage0(config, CUT, Materials(config, RANK0, "cpu", pytest.fail))
    mesh.gate.phase = Phase.LINK
    stage1.evidence = Evidence.of_rank(run_dir, JOB, config, mesh, "cpu", pytest.fail)
    envelopes = []
    for number in range(chunks):
        envelope = stage0.step()
        result = stage1.step(envelope, 10 + number)
        stage0.accept(result.latents_out_BFCHW, envelope.plan)
        envelopes.append(envelope)
    return envelopes


def replay(config: EngineConfig, run_dir: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    out.mkdir()
    capsys.readouterr()
    Replay(config, run_dir, out, JOB).run()
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture(scope="module")
def recorded(weights_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("recorded") / "run"
    record(make_config(weights_cache), run_dir)
    return run_dir


@pytest.fixture
def run(recorded: Path, tmp_path: Path) -> Path:
    import shutil

    shutil.copytree(recorded, tmp_path / "run")
    return tmp_path / "run"


def samples(path: Path) -> dict[str, np.ndarray]:
    return load(read_sealed(path, Kind.SAMPLES)[1])


def test_a_replay_takes_the_very_samples_of_the_rank(run: Path, weights_cache: Path, tmp_path: Path, capsys) -> None:
    events = replay(make_config(weights_cache), run, tmp_path / "out", capsys)
    assert [event["event"] for event in events] == ["start", "chunk", "chunk", "chunk", "chunk", "end"], events
    assert [event["calls"] for event in events[1:-1]] == [2, 3, 2, 3]
    assert [event["cache_epoch"] for event in events[1:-1]] == [0, 0, 1, 1]
    for chunk in range(4):
        ours, theirs = samples(samples_path(samples_dir(run, 0), chunk)), samples(samples_path(tmp_path / "out", chunk))
        assert ours.keys() == theirs.keys() == {"samples", "sums", "text_sums", "spans"}
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
        assert ours["samples"].shape[1:] == (2, 2, 4, 16, 4)  # layers, K and V, heads, tokens, dims
        assert np.abs(ours["samples"]).max() > 0
        assert (ours["sums"][..., 1] > 0).any()


@pytest.mark.parametrize("tp_plan", TP_PLANS)
def test_every_plan_records_what_v1_generator_only_would_send(
    tp_plan: str, weights_cache: Path, tmp_path: Path
) -> None:
    config = make_config(weights_cache, plan__tp_plan=tp_plan)
    envelopes = record(config, tmp_path / "run", 2)
    link, limits, shapes, buffer = LinkState(), Limits.of(config), Shapes.of(config), PayloadBuffer()
    for number, envelope in enumerate(envelopes):
        whole = dataclasses.replace(envelope, tp_plan=V1, prompt=None)
        frame = prepare(whole, call_id=10 + number, link=link, shapes=shapes, limits=limits, buffer=buffer)
        link.advance(frame.header)
        seal, raw = read_sealed(frame_path(tmp_path / "run", number), Kind.FRAME)
        assert (seal.job, seal.rank, seal.chunk_index) == (JOB, 0, number)
        assert raw == frame.header_bytes + frame.meta + frame.payload.numpy().tobytes()
    reader = FrameReader(tmp_path / "run", alone(config), JOB, "cpu")
    again = [reader.read(number) for number in range(2)]
    assert [one.envelope.plan for one in again] == [envelope.plan for envelope in envelopes]


def test_files_are_for_their_owner_alone(run: Path) -> None:
    for directory in (run / "frames", samples_dir(run, 0)):
        assert directory.stat().st_mode & 0o777 == 0o700
        files = list(directory.iterdir())
        assert len(files) == 4, files
        assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)


def foreign(path: Path) -> None:
    seal, body = read_sealed(path, Kind.FRAME)
    write_sealed(path, dataclasses.replace(seal, job="b" * 32), body)


def reseal(path: Path) -> None:
    """Sealed properly, around a frame that lies: the receiver's own checks find it."""
    seal, body = read_sealed(path, Kind.FRAME)
    raw = bytearray(body)
    raw[120] ^= 1
    write_sealed(path, seal, bytes(raw))


def other_kind(path: Path) -> None:
    seal, body = read_sealed(path, Kind.FRAME)
    write_sealed(path, dataclasses.replace(seal, kind=Kind.SAMPLES), body)


def shorter(path: Path) -> None:
    seal, body = read_sealed(path, Kind.FRAME)
    write_sealed(path, seal, body[:-16])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-7]), "bytes, "),
        (lambda path: path.write_bytes(b"x" * 40), "is cut short"),
        (lambda path: path.write_bytes(b"\0" * 500), "no recording of this engine"),
        (flip, "was altered"),
        (foreign, "is of job"),
        (reseal, "checksum"),
        (other_kind, "of kind 2"),
        (shorter, "payload"),
        (lambda path: path.unlink(), None),
    ],
)
def test_a_refused_frame_ends_the_replay_until_the_next_cut(
    damage, reason: str | None, run: Path, weights_cache: Path, tmp_path: Path, capsys
) -> None:
    damage(frame_path(run, 0))
    events = replay(make_config(weights_cache), run, tmp_path / "out", capsys)
    kinds = [(event["event"], event.get("chunk_index")) for event in events[1:-1]]
    lost = [("skip", 0)] if reason else []
    assert kinds == [*lost, ("skip", 1), ("chunk", 2), ("chunk", 3)], events
    assert reason is None or reason in events[1]["reason"], events
    assert "stands on a cache" in events[1 + len(lost)]["reason"]
    assert not samples_path(tmp_path / "out", 1).exists()
    ours = samples(samples_path(samples_dir(run, 0), 3))
    np.testing.assert_array_equal(samples(samples_path(tmp_path / "out", 3))["samples"], ours["samples"])


def test_a_file_that_would_block_is_refused(run: Path) -> None:
    import os

    frame_path(run, 0).unlink()
    os.mkfifo(frame_path(run, 0))
    with pytest.raises(SealedError, match="not a plain file"):
        read_sealed(frame_path(run, 0), Kind.FRAME)


def test_another_geometry_is_refused(run: Path, weights_cache: Path, tmp_path: Path, capsys) -> None:
    events = replay(make_config(weights_cache, geometry__width=48), run, tmp_path / "out", capsys)
    assert {event["event"] for event in events} == {"start", "skip", "end"}
    assert "width" in events[1]["reason"]


def full_disk(monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    """The kernel refuses writes to files of this ending: what a full disk does."""
    import errno
    import os

    real = os.write
    blocked: set[int] = set()
    real_open = os.open

    def opening(path: Any, *args: Any, **kwargs: Any) -> int:
        fd = real_open(path, *args, **kwargs)
        (blocked.add if str(path).endswith(f"{ending}.partial") else blocked.discard)(fd)
        return fd

    def writing(fd: int, data: Any) -> int:
        if fd in blocked:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data)

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "write", writing)


@pytest.mark.parametrize(("ending", "words"), [(".frame", "no recorded frames"), (".samples", "no cache samples")])
def test_a_full_disk_ends_the_keeping_and_not_the_job(
    ending: str, words: str, weights_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(weights_cache)
    warned: list[str] = []
    monkeypatch.setattr(pytest, "fail", warned.append)
    full_disk(monkeypatch, ending)
    assert len(record(config, tmp_path / "run")) == 4
    assert len(warned) == 1, warned
    assert warned[0].startswith(f"{words} from chunk 0 on: No space left")
    directory = tmp_path / "run" / "frames" if ending == ".frame" else samples_dir(tmp_path / "run", 0)
    assert list(directory.iterdir()) == []


def test_an_earlier_jobs_files_go(weights_cache: Path, run: Path) -> None:
    record(make_config(weights_cache), run, 1)
    assert [path.name for path in (run / "frames").iterdir()] == ["chunk_00000.frame"]


def test_places_are_the_same_for_a_head_wherever_it_lives() -> None:
    kv = KVCache(
        num_layers=3, heads=8, head_dim=16, tokens_per_frame=4, window_frames=6, sink_frames=1,
        dtype=torch.float32, device="cpu",
    )  # fmt: skip
    span = kv.span(0, 3)
    kv.append(0, span, torch.zeros(1, 12, 8, 16), torch.zeros(1, 12, 8, 16))
    tokens, dims = places(5, 2, 3, range(8), 16, span)
    part_tokens, part_dims = places(5, 2, 3, range(4, 6), 16, span)
    np.testing.assert_array_equal(tokens[:, 4:6], part_tokens)
    np.testing.assert_array_equal(dims[:, 4:6], part_dims)
    assert tokens.max() < span.live
    assert dims.max() < 16
    assert len({tuple(row) for row in tokens.reshape(-1, SAMPLED_TOKENS).tolist()}) == 24  # another set for each
    other, _ = places(5, 3, 3, range(8), 16, span)
    assert (other != tokens).any()


def test_a_drift_of_one_value_at_an_unsampled_place_moves_a_sum() -> None:
    generator = torch.Generator().manual_seed(3)
    kv = KVCache(
        num_layers=2, heads=2, head_dim=16, tokens_per_frame=24, window_frames=6, sink_frames=0,
        dtype=torch.float32, device="cpu",
    )  # fmt: skip
    span = kv.span(0, 3)
    for memory in kv.memory:
        memory.copy_(torch.randn(memory.shape, generator=generator))
    kv._last = span
    sampler = KVSampler(0, 2)
    sampler.begin(0)
    tokens, dims = places(0, 0, 2, range(2), 16, span)
    taken = {(int(t), int(q)) for p, t in enumerate(tokens[1, 1]) for q in dims[1, 1, p]}
    token, dim = next((t, q) for t in range(span.live) for q in range(16) if (t, q) not in taken)
    before = sampler._sums(kv, span)
    at_samples = sampler._sample(kv, span, 0)
    kv.memory[0][1, 0, token, 1, dim] += 0.01
    np.testing.assert_array_equal(sampler._sample(kv, span, 0), at_samples)
    moved = (sampler._sums(kv, span) - before).abs()
    assert set(map(tuple, (moved > 1e-9).nonzero()[:, :4].tolist())) == {(1, 0, 1, token // 24)}
    n = 24 * 16
    scale = before[1, 0, 1, token // 24, 1] / n
    assert moved[1, 0, 1, token // 24, 2] / (scale * n**0.5) > 5e-4  # well above rounding, which reads 1e-6


def test_a_broken_plan_is_refused_before_a_byte_is_kept(weights_cache: Path, tmp_path: Path) -> None:
    """The keeper's own preflight: what cannot be replayed is not recorded, and the rank's own check still raises."""
    warned: list[str] = []
    config = make_config(weights_cache)
    (tmp_path / "run").mkdir()
    mesh = Group.solo()
    mesh.gate.phase = Phase.LINK
    generator = build_generator(config, mesh, "sdpa", "cpu")
    stage1 = Stage1(generator.dit, generator.kv, generator.cross, mesh, config, BlackBox(tmp_path / "box", 0))
    stage1.evidence = Evidence.of_rank(tmp_path / "run", JOB, config, mesh, "cpu", warned.append)
    envelope = Stage0(config, CUT, Materials(config, RANK0, "cpu", pytest.fail)).step()
    broken = dataclasses.replace(envelope, plan=dataclasses.replace(envelope.plan, expected_calls=9))
    with pytest.raises(EngineError):
        stage1.step(broken, 0)
    assert len(warned) == 1
    assert list((tmp_path / "run" / "frames").iterdir()) == []


def test_a_seal_is_read_back(tmp_path: Path) -> None:
    seal = Seal(Kind.SAMPLES, JOB, -1, 7)
    write_sealed(tmp_path / "x", seal, b"body")
    assert read_sealed(tmp_path / "x", Kind.SAMPLES) == (seal, b"body")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
