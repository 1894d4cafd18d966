"""Video-to-video: frames of real files, good and bad; their latents; and every plan against the single process."""

from __future__ import annotations

import json
import shutil
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine.assets import vae_dir
from engine.codecs.vae import StreamingVAE
from engine.config import EngineConfig, from_dict
from engine.errors import CodecError, ConfigError, SourceError
from engine.lifecycle import Doing
from engine.materials import PARTS, Materials
from engine.plan import V0, V1, V11A, V11B
from engine.sources.video import VideoSource
from engine.wire.envelope import Shapes
from engine.wire.frame import PayloadBuffer, prepare
from engine.wire.header import Limits, LinkState
from tests.cpu.test_stages import Job
from tests.support.ranks import Outcome, run_ranks

H, W = 32, 32


def film(
    path: Path, frames: int, *, height: int = 48, width: int = 80, first: int = 0, format: str | None = None
) -> Path:
    """Noise to the right of a grey that tells the number of the frame; the noise costs bytes, as a film does."""
    import av

    with av.open(str(path), "w", format=format) as container:
        stream: Any = container.add_stream("libx264", rate=24, options={"crf": "10", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(first, first + frames):
            pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
            pixels[:, : width * 3 // 4] = 20 + 7 * number
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def source(path: Path, on_end: str = "stop") -> VideoSource:
    return VideoSource(path, height=H, width=W, on_end=on_end)


def numbers(frames_THWC: np.ndarray) -> list[int]:
    """Of the frames, by the grey in their middle."""
    return [round((float(frame[8:24, 4:16].mean()) - 20) / 7) for frame in frames_THWC]


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(48, 80), (80, 48), (32, 32), (18, 20), (65, 33)])
def test_frames_of_any_size_cover_the_geometry(height: int, width: int, tmp_path: Path) -> None:
    reader = source(film(tmp_path / "a.mkv", 5, height=height // 2 * 2, width=width // 2 * 2))
    frames = reader.take(5)
    assert (frames.shape, frames.dtype) == ((5, H, W, 3), np.uint8)
    assert numbers(frames) == [0, 1, 2, 3, 4]
    assert reader.ended


def test_what_follows_the_last_frame_is_a_choice(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", 3)
    stop, loop, hold = (source(path, on_end) for on_end in ("stop", "loop", "hold"))
    assert numbers(loop.take(8)) == [0, 1, 2, 0, 1, 2, 0, 1]
    assert numbers(hold.take(5)) == [0, 1, 2, 2, 2]
    assert not stop.ended
    assert numbers(stop.take(4)) == [0, 1, 2, 2]  # a chunk that has begun is filled
    assert (stop.ended, loop.ended, hold.ended) == (True, False, False)


def test_one_frame_is_a_source(tmp_path: Path) -> None:
    one = source(film(tmp_path / "one.mp4", 1))
    assert not one.ended
    assert numbers(one.take(9)) == [0] * 9
    assert one.ended


def test_frames_that_change_size_all_fit(tmp_path: Path) -> None:
    wide = film(tmp_path / "wide.h264", 4, format="h264")
    tall = film(tmp_path / "tall.h264", 4, height=96, width=64, first=4, format="h264")
    (tmp_path / "both.h264").write_bytes(wide.read_bytes() + tall.read_bytes())
    assert numbers(source(tmp_path / "both.h264").take(8)) == list(range(8))


def bad_files(directory: Path) -> dict[str, Path]:
    with wave.open(str(directory / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(1600))
    (directory / "text.mp4").write_text("no film at all " * 100)
    (directory / "empty.mp4").touch()
    film(directory / "whole.mp4", 10)
    (directory / "no-index.mp4").write_bytes((directory / "whole.mp4").read_bytes()[:-1200])
    return {
        "missing": directory / "missing.mp4",
        "directory": directory,
        "sound": directory / "sound.wav",
        "text": directory / "text.mp4",
        "empty": directory / "empty.mp4",
        "no-index": directory / "no-index.mp4",
    }


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("missing", "TP-5152"),
        ("directory", "TP-5153"),
        ("sound", "TP-5154"),
        ("text", "TP-5153"),
        ("empty", "TP-5153"),
        ("no-index", "TP-5153"),
    ],
)
def test_what_is_no_video_is_found_before_the_stream_begins(name: str, code: str, tmp_path: Path) -> None:
    path = bad_files(tmp_path)[name]
    with pytest.raises(SourceError) as caught:
        source(path)
    assert (caught.value.code, caught.value.exit_code) == (code, 77)
    assert str(path) in caught.value.message


def damaged(path: Path) -> Path:
    """A few bytes in the middle of the film are zero."""
    raw = bytearray(path.read_bytes())
    middle = len(raw) // 2
    raw[middle : middle + 3000] = bytes(3000)
    path.write_bytes(raw)
    return path


def cut(path: Path) -> Path:
    """Two thirds of the film came over."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    return path


@pytest.mark.parametrize(
    ("spoil", "suffix"),  # a cut mp4 lacks its index; a cut ts just ends
    [(damaged, "mp4"), (damaged, "mkv"), (damaged, "ts"), (cut, "mkv")],
)
def test_damage_in_the_middle_is_said_after_the_last_good_frame(spoil: Any, suffix: str, tmp_path: Path) -> None:
    reader = source(spoil(film(tmp_path / f"a.{suffix}", 30)))
    got: list[int] = []
    with pytest.raises(SourceError, match=r"cannot be read after frame \d+") as caught:  # noqa: PT012 - of a loop
        while not reader.ended:
            got += numbers(reader.take(1))
    assert (caught.value.code, caught.value.exit_code) == ("TP-5153", 70)
    assert got == list(range(caught.value.evidence["frames_read"]))
    assert 5 < len(got) < 30


# Configuration --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ({"source__noise_scale": 0.0}, "TP-5150", r"in \(0, 1\]"),
        ({"source__noise_scale": 1.01}, "TP-5150", r"in \(0, 1\]"),
        ({"source__noise_scale": float("nan")}, "TP-5150", r"in \(0, 1\]"),
        ({"source__noise_scale": 0.2}, "TP-5150", "no step begins there"),
        ({"source__on_end": "rewind"}, "TP-1007", "one of: stop, loop, hold"),
    ],
)
def test_a_source_that_cannot_be_served_is_refused(changes: dict[str, Any], code: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        EngineConfig().replace(source__video="film.mp4", **changes)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("scale", "steps"),
    [(1.0, (1000, 750, 500, 250)), (0.75, (750, 500, 250)), (0.7, (500, 250)), (0.25, (250,))],
)
def test_steps_begin_at_the_step_nearest_below_the_noise(scale: float, steps: tuple[int, ...]) -> None:
    config = EngineConfig().replace(source__video="film.mp4", source__noise_scale=scale)
    assert (config.steps, config.noise_scale) == (steps, scale)
    assert (EngineConfig().steps, EngineConfig().noise_scale) == ((1000, 750, 500, 250), None)


# Latents --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[9, 12], [1, 4, 16], [21]])
def test_the_encoder_streams_bit_for_bit(cuts: list[int], weights_cache: Path) -> None:
    config = EngineConfig().replace(model__cache_dir=str(weights_cache))
    vae = StreamingVAE.load(vae_dir(config), device="cpu", dtype=torch.float32)
    pixels = torch.rand(1, 21, 3, H, W, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = vae.encode(pixels)
    parts = []
    for part in pixels.split(cuts, dim=1):
        parts.append(vae.encode_next(part))
        vae.encode_frame(part[:, :1])  # an anchor in between leaves the stream alone
    assert torch.cat(parts, dim=1).equal(whole)
    with pytest.raises(CodecError, match="encodes 4n frames"):
        vae.encode_next(pixels[:, :5])
    vae.reset()
    assert vae.encode_next(pixels[:, :9]).equal(whole[:, :3])


def make_config(cache: Path, path: Path | None, **dotted: Any) -> EngineConfig:
    base: dict[str, Any] = {
        "model": {"cache_dir": str(cache)},
        "geometry": {"height": H, "width": W},
        "run": {"chunks": 10, "record_latents": True},
        "sink": {"kinds": ["mp4"]},
        "source": {"video": str(path) if path else ""},
    }
    return from_dict(base).replace(**dotted)


def test_all_noise_is_the_stream_without_a_source(weights_cache: Path, tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", 30)
    config = make_config(weights_cache, path, source__noise_scale=1.0)
    with_source, without = Job(config, tmp_path), Job(make_config(weights_cache, None), tmp_path)
    less = Job(config.replace(source__noise_scale=0.5), tmp_path)
    for _ in range(2):
        envelope, latents, _ = with_source.chunk()
        plain, expected, _ = without.chunk()
        half, other, _ = less.chunk()
        assert (envelope.plan.noise_scale, plain.plan.noise_scale, half.plan.noise_scale) == (1.0, None, 0.5)
        assert latents.equal(expected)
        assert half.plan.denoising_step_list == (500, 250)
        assert not other.equal(expected)


@pytest.mark.parametrize("tp_plan", [V0, V11A, V11B, V1])
def test_a_worker_of_any_plan_ends_with_the_tensors_of_stage_0(
    tp_plan: str, weights_cache: Path, tmp_path: Path
) -> None:
    config = make_config(weights_cache, film(tmp_path / "a.mp4", 30), plan__tp_plan=tp_plan)
    job, worker = Job(config, tmp_path), Materials(config, PARTS[tp_plan], "cpu", print)
    assert (worker.source is not None) == (tp_plan in (V0, V11A))  # the others are sent the latents
    link, buffer = LinkState(), PayloadBuffer("cpu")
    for index in range(2):
        envelope = job.stage0.step()
        sent = job.stage0.for_link(envelope)
        frame = prepare(
            sent, call_id=index + 1, link=link, shapes=Shapes.of(config), limits=Limits.of(config), buffer=buffer
        )
        link.advance(frame.header)
        assert json.loads(frame.meta)["envelope"]["noise_scale"] == 0.7
        whole = worker.complete(sent)
        for name, tensor in envelope.tensors.items():
            if tensor is None:
                assert whole.tensors[name] is None
            else:
                assert tensor.equal(whole.tensors[name]), name
        result = job.stage1.step(envelope, index + 1)
        assert result.observed_generator_calls == 2 + int(index > 0)
        job.stage0.accept(result.latents_out_BFCHW, envelope.plan)
        if worker.parts.vae_decoder:
            worker.decode(result.latents_out_BFCHW)


def test_a_hard_cut_goes_on_in_the_video(weights_cache: Path, tmp_path: Path) -> None:
    from engine.timeline import Event, Timeline

    config = make_config(weights_cache, film(tmp_path / "a.mp4", 30))
    job = Job(config, tmp_path, Timeline((Event(0, "a boat"), Event(1, cut=True))))
    at: list[Doing] = []
    job.materials.at = at.append
    first, _, _ = job.chunk()
    assert at == [Doing.SOURCE, Doing.PREPARE]  # whoever reads the source says when it is at it, and when no more
    second, _, _ = job.chunk()
    assert second.plan.current_start_frame == 0
    assert first.tensors["renoise"].equal(second.tensors["renoise"])  # the noise repeats
    assert not first.tensors["latents"].equal(second.tensors["latents"])
    assert job.materials.source._given == 18  # two chunks of 9 frames, each the first of a stream


# Ranks ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(weights_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A film of two chunks and a bit, and what one process makes of it: it stops after the third."""
    path = tmp_path_factory.mktemp("reference")
    video = film(path / "film.mp4", 27)
    outcome = run_ranks(path / "run", make_config(weights_cache, video))
    assert outcome.exit_codes == {0: 0}, outcome.stderr[0]
    assert outcome.reports[0]["account"] == {"accepted": 3, "emitted": 3, "dropped": 0, "abandoned": 0}
    return video, outcome


def same(ours: Outcome, theirs: Outcome, chunks: int, tolerance: float = 1e-4) -> None:
    mine, other = (load_file(outcome.run_dir / "latents.safetensors") for outcome in (ours, theirs))
    assert sorted(mine) == [f"chunk_{index:05d}" for index in range(chunks)]
    for key, latents in mine.items():
        assert (latents - other[key]).abs().max() <= tolerance * other[key].abs().max(), key


@pytest.mark.parametrize(("tp_plan", "tp"), [(V1, 2), ("pp0", 1)])
def test_a_mesh_equals_the_single_process(
    tp_plan: str, tp: int, reference: tuple[Path, Outcome], weights_cache: Path, tmp_path: Path
) -> None:
    video, theirs = reference
    outcome = run_ranks(tmp_path / "run", make_config(weights_cache, video, plan__tp_plan=tp_plan, plan__tp=tp))
    assert outcome.exit_codes == {0: 0, 1: 0}, outcome.stderr
    same(outcome, theirs, 3, tolerance=1e-4 if tp > 1 else 0.0)
    assert outcome.reports[0]["account"] == {"accepted": 3, "emitted": 3, "dropped": 0, "abandoned": 0}
    assert [chunk["observed_generator_calls"] for chunk in outcome.reports[1]["chunks"]] == [2, 3, 3]


def test_v0_reads_it_on_every_rank_and_damage_drains_what_was_made(
    reference: tuple[Path, Outcome], weights_cache: Path, tmp_path: Path
) -> None:
    """Both ranks hold the same damaged film: the chunks before the damage are those of the whole one, and are kept."""
    video, theirs = reference
    spoilt = Path(shutil.copy(video, tmp_path / "film.mp4"))
    damaged_at = bytearray(spoilt.read_bytes())
    damaged_at[len(damaged_at) * 5 // 8 : len(damaged_at) * 5 // 8 + 2000] = bytes(2000)
    spoilt.write_bytes(damaged_at)
    outcome = run_ranks(tmp_path / "run", make_config(weights_cache, spoilt, plan__tp_plan=V0, plan__tp=2))
    assert outcome.exit_codes == {0: 70, 1: 0}, outcome.stderr
    error, account = outcome.reports[0]["error"], outcome.reports[0]["account"]
    assert error["code"] == "TP-5153"
    made = account["emitted"]
    assert 1 <= made < 3
    assert account == {"accepted": made, "emitted": made, "dropped": 0, "abandoned": 0}
    same(outcome, theirs, made)
    assert Path(outcome.reports[0]["outputs"]["mp4"]).stat().st_size > 0


def test_ranks_of_v0_that_read_different_files_end_before_any_chunk(
    reference: tuple[Path, Outcome], weights_cache: Path, tmp_path: Path
) -> None:
    """One path, another file on each host: here by a path that each rank sees from a directory of its own."""
    video, _ = reference
    for rank in (0, 1):
        (tmp_path / f"host{rank}").mkdir()
        shutil.copy(video, tmp_path / f"host{rank}" / "film.mp4")
    film(tmp_path / "host1" / "film.mp4", 26)
    config = make_config(weights_cache, None, plan__tp_plan=V0, plan__tp=2).replace(source__video="film.mp4")
    entry = (
        "-c",
        f"import os, sys; sys.path.insert(0, os.getcwd()); os.chdir({str(tmp_path)!r} + '/host' + os.environ['RANK'])\n"
        "from engine.worker import main; os._exit(main(sys.argv[1:]))",
    )
    outcome = run_ranks(tmp_path / "run", config, entry=entry)
    assert outcome.exit_codes == {0: 75, 1: 75}, outcome.stderr
    assert set(outcome.reports[0]["error"]["evidence"]["differences"]) == {"source.sha256"}
    assert outcome.reports[0]["chunks"] == []
