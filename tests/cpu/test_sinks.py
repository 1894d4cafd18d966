"""The sinks: what is written can be read back, and what fails leaves nothing behind."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import resource
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.config import SinkConfig
from engine.errors import SinkError
from engine.sinks import encoder
from engine.sinks.base import SinkSet, open_sinks
from engine.sinks.mp4 import Mp4Sink
from engine.sinks.null import NullSink
from engine.sinks.raw import RawSink
from engine.sinks.sheet import MAX_ROWS, SheetSink
from engine.sinks.staged import Staged

H, W, FPS = 48, 80, 12
ALL = ("mp4", "sheet", "raw", "null")
COLOURS = np.array([(200, 30, 30), (30, 200, 30), (30, 30, 200), (220, 220, 40)], dtype=np.uint8)


def chunk(index: int, frames: int) -> np.ndarray:
    """Flat colour by chunk, with a ramp that moves by frame."""
    pixels_THWC = np.broadcast_to(COLOURS[index % 4], (frames, H, W, 3)).copy()
    for frame in range(frames):
        pixels_THWC[frame, :, : 4 * (frame + 1)] //= 2
    return pixels_THWC


def noise(index: int, frames: int = 12) -> np.ndarray:
    """Incompressible pixels: each chunk costs the disk what it should."""
    return np.random.default_rng(index).integers(0, 256, (frames, H, W, 3), dtype=np.uint8)


def open_all(directory: Path, kinds: tuple[str, ...] = ALL) -> SinkSet:
    return open_sinks(SinkConfig(kinds=kinds, fps=FPS), directory, height=H, width=W)


def decode(path: Path) -> tuple[np.ndarray, float, str]:
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return np.stack(frames), float(stream.average_rate), stream.codec_context.pix_fmt


def test_the_video_has_every_frame_at_the_size_and_rate_asked(tmp_path: Path) -> None:
    sinks = open_all(tmp_path, ("mp4",))
    written = [chunk(0, 9), chunk(1, 12), chunk(2, 12)]
    for index, pixels in enumerate(written):
        sinks.write(pixels, index, "a prompt")
    paths = sinks.close()
    assert paths == {"mp4": str(tmp_path / "video.mp4")}
    pixels_THWC, rate, pix_fmt = decode(tmp_path / "video.mp4")
    assert pixels_THWC.shape == (33, H, W, 3)
    assert rate == FPS
    assert pix_fmt == "yuv420p"
    error = np.abs(pixels_THWC.astype(int) - np.concatenate(written).astype(int))
    assert error.mean() < 8  # colour is subsampled and quantised, order and content are not
    assert error[:, :, 40:].mean() < 5


def test_the_same_pixels_give_the_same_bytes(tmp_path: Path) -> None:
    digests = set()
    for run in range(20):  # an encoder that reads what it should not differs now and then, not each time
        directory = tmp_path / str(run)
        directory.mkdir()
        sinks = open_all(directory)
        for index in range(3):
            sinks.write(chunk(index, 9), index, f"prompt {index}")
        digests.add(tuple(hashlib.sha256(Path(p).read_bytes()).hexdigest() for p in sinks.close().values()))
    assert len(digests) == 1
    assert len(set(next(iter(digests)))) == 3


def test_the_encoder_that_stands_in_for_x264_writes_a_video_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if encoder.pick_encoder() == "libx264":
        monkeypatch.setattr(encoder, "NAMES", ("mpeg4",))
    assert encoder.pick_encoder() == "mpeg4"
    sink = Mp4Sink(tmp_path / "video.mp4", height=H, width=W, fps=FPS)
    sink.write(chunk(3, 12), 0, "")
    assert sink.close() == tmp_path / "video.mp4"
    pixels_THWC, rate, _ = decode(tmp_path / "video.mp4")
    assert (len(pixels_THWC), rate) == (12, FPS)


def test_the_sheet_has_a_row_a_chunk_and_differs_by_frames_and_by_prompt(tmp_path: Path) -> None:
    from PIL import Image

    def sheet(name: str, colours: list[int], prompt: str) -> np.ndarray:
        sink = SheetSink(tmp_path / name, height=H, width=W)
        for index, colour in enumerate(colours):
            sink.write(chunk(colour, 9), index, prompt)
        assert sink.close() == tmp_path / name
        with Image.open(tmp_path / name) as image:
            assert image.format == "PNG"
            return np.asarray(image)

    two, three = sheet("a.png", [0, 1], "a fox"), sheet("b.png", [0, 1, 2], "a fox")
    assert two.shape == (4 + 2 * (18 + 72 + 4), 4 + 3 * (120 + 4), 3)
    assert three.shape[0] - two.shape[0] == 18 + 72 + 4
    assert (two[4 + 18 + 36, 110] == COLOURS[0]).all()
    assert (two[4 + 94 + 18 + 36, 110] == COLOURS[1]).all()
    assert not np.array_equal(two, sheet("c.png", [0, 3], "a fox"))
    other_prompt = sheet("d.png", [0, 1], "a boat")
    changed_rows = np.flatnonzero((two != other_prompt).any(axis=(1, 2)))
    assert changed_rows.size
    assert all((row - 4) % 94 < 18 for row in changed_rows)  # only captions changed


@pytest.mark.parametrize("prompt", ["x" * 4000, "two\nlines\tand a tab", "狐狸 🦊 лиса", ""])
def test_any_prompt_fits_its_caption(tmp_path: Path, prompt: str) -> None:
    from PIL import Image

    sink = SheetSink(tmp_path / "sheet.png", height=H, width=W)
    sink.write(chunk(0, 1), 7, prompt)
    sink.close()
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.size == (4 + 3 * 124, 4 + 94)
        caption = np.asarray(image)[4:22]
        assert (caption > 128).any()
        assert not (caption[:, -4:] > 128).any()  # the margin stays empty


def test_a_long_run_keeps_the_sheet_small_and_its_first_chunk(tmp_path: Path) -> None:
    from PIL import Image

    sink = SheetSink(tmp_path / "sheet.png", height=H, width=W)
    for index in range(MAX_ROWS * 3):
        sink.write(chunk(0 if index == 0 else 1, 1), index, "long")
    sink.close()
    with Image.open(tmp_path / "sheet.png") as image:
        rows = (image.height - 4) // 94
        assert MAX_ROWS // 2 < rows <= MAX_ROWS
        assert (np.asarray(image)[4 + 18 + 36, 110] == COLOURS[0]).all()


def test_raw_frames_come_back_exactly(tmp_path: Path) -> None:
    from safetensors import safe_open

    sinks = open_all(tmp_path, ("raw",))
    sinks.write(noise(0, 9), 0, "one")
    sinks.write(noise(1), 1, "one")
    sinks.write(noise(2), 2, 'two "quoted"')
    path = sinks.close()["raw"]
    with safe_open(path, framework="numpy") as stored:
        assert sorted(stored.keys()) == ["chunk_00000", "chunk_00001", "chunk_00002"]
        assert np.array_equal(stored.get_tensor("chunk_00000"), noise(0, 9))
        assert np.array_equal(stored.get_tensor("chunk_00002"), noise(2))
        assert stored.metadata() == {
            "fps": str(FPS),
            "layout": "THWC",
            "prompt_00000": "one",
            "prompt_00002": 'two "quoted"',
        }


def test_raw_makes_room_when_its_index_outgrows_the_reserve(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    sink = RawSink(tmp_path / "raw.safetensors", fps=FPS, room_bytes=64)
    for index in range(100):
        sink.write(noise(index, 1), index, f"prompt {index}")
    sink.close()
    with (tmp_path / "raw.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        assert length % 8 == 0
        assert len(json.loads(file.read(length))) == 101
    stored = load_file(tmp_path / "raw.safetensors")
    assert all(np.array_equal(stored[f"chunk_{i:05d}"], noise(i, 1)) for i in range(100))


def test_raw_moves_data_larger_than_one_block(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    sink = RawSink(tmp_path / "raw.safetensors", fps=FPS, room_bytes=128)
    big = np.random.default_rng(0).integers(0, 256, (100, 64, 64, 3), dtype=np.uint8)
    for index in range(4):
        sink.write(big + np.uint8(index), index, "p" * 100 * (index + 1))
    sink.close()
    stored = load_file(tmp_path / "raw.safetensors")
    assert all(np.array_equal(stored[f"chunk_{i:05d}"], big + np.uint8(i)) for i in range(4))


def test_null_counts() -> None:
    sink = NullSink()
    sink.write(chunk(0, 9), 0, "")
    sink.write(chunk(0, 12), 1, "")
    assert (sink.frames, sink.chunks, sink.close()) == (21, 2, None)


def test_nothing_stands_under_its_name_before_close(tmp_path: Path) -> None:
    (tmp_path / "video.mp4").write_bytes(b"an older video")
    sinks = open_all(tmp_path)
    sinks.write(chunk(0, 9), 0, "p")
    assert (tmp_path / "video.mp4").read_bytes() == b"an older video"
    assert not (tmp_path / "sheet.png").exists()
    assert not (tmp_path / "frames.safetensors").exists()
    paths = sinks.close()
    assert sorted(os.listdir(tmp_path)) == ["frames.safetensors", "sheet.png", "video.mp4"]
    assert sorted(paths) == ["mp4", "raw", "sheet"]
    assert (tmp_path / "video.mp4").read_bytes()[4:8] == b"ftyp"
    assert sinks.close() == {}


def test_abort_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "video.mp4").write_bytes(b"an older video")
    sinks = open_all(tmp_path)
    sinks.write(chunk(0, 9), 0, "p")
    sinks.abort()
    sinks.abort()
    assert os.listdir(tmp_path) == ["video.mp4"]
    assert (tmp_path / "video.mp4").read_bytes() == b"an older video"
    with pytest.raises(SinkError, match="after the sinks were closed"):
        sinks.write(chunk(1, 9), 1, "p")


def test_a_run_without_chunks_makes_no_files(tmp_path: Path) -> None:
    assert open_all(tmp_path).close() == {}
    assert os.listdir(tmp_path) == []


def test_a_new_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    sinks = open_all(tmp_path)
    sinks.write(chunk(0, 1), 0, "p")
    modes = {Path(path).stat().st_mode for path in sinks.close().values()}
    assert modes == {(tmp_path / "plain").stat().st_mode}


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (np.zeros((2, H, W + 16, 3), np.uint8), "is uint8"),
        (np.zeros((2, H, W, 3), np.float32), "is float32"),
        (np.zeros((0, H, W, 3), np.uint8), r"\[0, 48, 80, 3\]"),
        (np.zeros((H, W, 3), np.uint8), r"\[48, 80, 3\]"),
    ],
)
def test_wrong_frames_are_refused(tmp_path: Path, pixels: np.ndarray, reason: str) -> None:
    sinks = open_all(tmp_path)
    with pytest.raises(SinkError, match=reason) as caught:
        sinks.write(pixels, 0, "p")
    assert caught.value.code == "TP-5103"
    assert os.listdir(tmp_path) == []


def test_a_chunk_is_never_written_twice(tmp_path: Path) -> None:
    sinks = open_all(tmp_path, ("raw",))
    sinks.write(chunk(0, 1), 0, "p")
    with pytest.raises(SinkError, match="chunk 0 came after chunk 0"):
        sinks.write(chunk(0, 1), 0, "p")


def test_a_missing_directory_is_found_before_any_chunk(tmp_path: Path) -> None:
    with pytest.raises(SinkError) as caught:
        open_all(tmp_path / "gone")
    error = caught.value
    assert error.code == "TP-5101"
    assert str(tmp_path / "gone" / "video.mp4") in error.message
    assert os.strerror(errno.ENOENT) in error.message
    assert error.next_step == f"mkdir -p {tmp_path / 'gone'}"
    assert error.to_record()["evidence"]["errno"] == "ENOENT"


def test_a_file_in_place_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SinkError, match=os.strerror(errno.ENOTDIR)):
        open_all(tmp_path / "file")


def test_a_directory_in_place_of_the_file_leaves_no_sibling(tmp_path: Path) -> None:
    (tmp_path / "sheet.png").mkdir()
    with pytest.raises(SinkError, match=os.strerror(errno.EISDIR)) as caught:
        open_all(tmp_path)
    assert caught.value.where == str(tmp_path / "sheet.png")
    assert os.listdir(tmp_path) == ["sheet.png"]  # the mp4, opened first, is gone again


def test_a_place_that_takes_no_files() -> None:
    with pytest.raises(SinkError) as caught:
        open_all(Path("/proc/self"))
    assert caught.value.code == "TP-5101"
    assert "/proc/self/video.mp4" in caught.value.message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(SinkError, match=os.strerror(errno.EACCES)):
        open_all(tmp_path / "locked")


def test_a_directory_removed_in_mid_run(tmp_path: Path) -> None:
    directory = tmp_path / "out"
    directory.mkdir()
    sinks = open_all(directory)
    sinks.write(chunk(0, 9), 0, "p")
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()
    with pytest.raises(SinkError, match=os.strerror(errno.ENOENT)) as caught:
        sinks.close()
    assert caught.value.evidence["kept"] == {}


def test_what_is_whole_is_kept_when_another_sink_fails_to_close(tmp_path: Path) -> None:
    sinks = open_all(tmp_path)
    sinks.write(chunk(0, 9), 0, "p")
    (tmp_path / "sheet.png").mkdir()
    with pytest.raises(SinkError) as caught:
        sinks.close()
    assert sorted(caught.value.evidence["kept"]) == ["mp4", "raw"]
    assert sorted(os.listdir(tmp_path)) == ["frames.safetensors", "sheet.png", "video.mp4"]
    assert len(decode(tmp_path / "video.mp4")[0]) == 9


# A file-size limit makes the kernel refuse a write as a full disk does, for any user and on any machine.
LIMITED = """
import json, resource, sys
from pathlib import Path
import numpy as np
from engine.config import SinkConfig
from engine.errors import SinkError
from engine.sinks.base import open_sinks
kind, directory, limit = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
stage = "open"
try:
    sinks = open_sinks(SinkConfig(kinds=(kind, "null")), directory, height=256, width=256)
    stage = "write"
    for index in range(40):
        sinks.write(np.random.default_rng(index).integers(0, 256, (4, 256, 256, 3), dtype=np.uint8), index, "p")
    stage = "close"
    sinks.close()
except SinkError as error:
    print(json.dumps({"stage": stage, **error.to_record()}))
"""


@pytest.mark.parametrize(
    ("kind", "limit", "stage"),
    [
        ("mp4", 1000, "open"),
        ("sheet", 1000, "open"),
        ("raw", 1000, "open"),
        ("mp4", 1_000_000, "write"),
        ("raw", 1_000_000, "write"),
        ("sheet", 1_000_000, "close"),
    ],
)
def test_a_file_that_may_not_grow_ends_in_one_error_and_no_file(
    tmp_path: Path, kind: str, limit: int, stage: str
) -> None:
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, kind, str(tmp_path), str(limit)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # no half-closed file complains on the way out
    record = json.loads(result.stdout)
    assert (record["stage"], record["code"], record["evidence"]["errno"]) == (stage, "TP-5102", "EFBIG")
    assert record["next"] == f"df -h {tmp_path}"
    assert os.listdir(tmp_path) == []


def write_all(sinks: SinkSet, chunks: int) -> None:
    for index in range(chunks):
        sinks.write(noise(index), index, "p")


def swallow(staged: Staged) -> None:
    """Lose the error, as a C library may that calls back into Python."""
    with contextlib.suppress(OSError):
        staged.write(bytes(200))


def mounted(directory: Path, size: str) -> bool:
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(directory)]
    return subprocess.run(command, capture_output=True, check=False, timeout=30).returncode == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    if not mounted(disk, "1m"):
        pytest.skip("this machine does not let us mount a tmpfs")
    try:
        sinks = open_all(disk, ("raw", "mp4"))
        with pytest.raises(SinkError, match=os.strerror(errno.ENOSPC)) as caught:
            write_all(sinks, 40)
        assert caught.value.code == "TP-5102"
        assert os.listdir(disk) == []
        (disk / "ballast").write_bytes(bytes(990_000))
        with pytest.raises(SinkError, match=os.strerror(errno.ENOSPC)):
            open_all(disk, ("null", "mp4"))
        assert os.listdir(disk) == ["ballast"]
    finally:
        subprocess.run(["umount", str(disk)], check=True, timeout=30)


def test_an_error_of_the_library_discards_the_file(tmp_path: Path) -> None:
    staged = Staged(tmp_path / "x")
    with pytest.raises(KeyError), staged.guard():
        raise KeyError("not a disk error")
    assert not staged.open
    assert os.listdir(tmp_path) == []


def test_a_swallowed_disk_error_is_still_raised(tmp_path: Path) -> None:
    staged = Staged(tmp_path / "x")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        with pytest.raises(SinkError, match=os.strerror(errno.EFBIG)), staged.guard():
            swallow(staged)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_loading_the_sinks_loads_no_media_library() -> None:
    code = "import sys, engine.sinks.base; print(sorted({'av', 'PIL', 'torch', 'numpy'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"
