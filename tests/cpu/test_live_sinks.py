"""Sinks of a live stream: segments, preview and pipe; and the writer thread with its policies for a slow one."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import SinkConfig
from engine.errors import SinkError
from engine.sinks import writer as writing
from engine.sinks.base import SinkSet, open_sinks
from engine.sinks.pipe import PipeSink
from engine.sinks.preview import PreviewSink
from engine.sinks.segments import SegmentsSink
from engine.sinks.writer import SinkWriter

H, W, FPS = 32, 48, 16
DEADLINE_S = 30.0


def chunk(index: int, frames: int = 12) -> np.ndarray:
    """Grey by chunk, so that a decoded frame tells which chunk it is of."""
    return np.full((frames, H, W, 3), 20 + 25 * index, dtype=np.uint8)


def play(path: Path) -> list[tuple[float, int]]:
    """Time in seconds and grey of every frame, as a player sees them."""
    import av

    with av.open(str(path)) as container:
        return [
            (float(frame.pts * frame.time_base), round(frame.to_ndarray(format="rgb24").mean()))
            for frame in container.decode(video=0)
        ]


def listed(directory: Path) -> list[str]:
    """The playlist's segments, each after its duration; `|` for a break."""
    found = []
    for line in (directory / "index.m3u8").read_text().splitlines():
        if line.startswith("#EXTINF:"):
            found.append(line[len("#EXTINF:") : -1])
        elif line == "#EXT-X-DISCONTINUITY":
            found.append("|")
        elif not line.startswith("#"):
            found[-1] += " " + line
    return found


def wait_for(condition: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, what
        threading.Event().wait(0.005)  # a poll: another process, or a pipe, has no event to wait for


# Segments -------------------------------------------------------------------------------------------------------------


def segments(directory: Path, **how: Any) -> SegmentsSink:
    return SegmentsSink(directory, height=H, width=W, fps=FPS, **how)


def test_each_chunk_is_a_segment_that_plays_by_itself(tmp_path: Path) -> None:
    sink = segments(tmp_path / "segments")
    for index, frames in enumerate((9, 12, 12)):
        sink.write(chunk(index, frames), index, "p")
        assert len(listed(tmp_path / "segments")) == index + 1  # not only at the end
    assert "#EXT-X-ENDLIST" not in (tmp_path / "segments" / "index.m3u8").read_text()
    assert sink.close() == tmp_path / "segments" / "index.m3u8"
    assert "#EXT-X-ENDLIST" in (tmp_path / "segments" / "index.m3u8").read_text()
    assert listed(tmp_path / "segments") == ["0.562500 00000000.ts", "0.750000 00000001.ts", "0.750000 00000002.ts"]
    last = play(tmp_path / "segments" / "00000002.ts")
    assert [abs(grey - 70) <= 2 for _, grey in last] == [True] * 12
    assert [t for t, _ in last] == pytest.approx([(21 + n) / FPS for n in range(12)])  # the time of the stream
    whole = play(tmp_path / "segments" / "index.m3u8")  # what a player of playlists makes of all of it
    assert len(whole) == 33
    assert stat.S_IMODE((tmp_path / "segments").stat().st_mode) == 0o700


def test_a_longer_segment_grows_whole_and_is_listed_when_full(tmp_path: Path) -> None:
    sink = segments(tmp_path, segment_s=1.4)  # two chunks of 0.75 s
    for index in range(3):
        sink.write(chunk(index), index, "p")
        assert len(play(tmp_path / f"{index // 2:08d}.ts")) == (24 if index == 1 else 12)
        assert len(listed(tmp_path)) == (0 if index == 0 else 1) if (tmp_path / "index.m3u8").exists() else index == 0
    sink.abort()
    assert listed(tmp_path) == ["1.500000 00000000.ts"]
    after = segments(tmp_path)  # a later sink finds what the first did not list
    after.write(chunk(3), 0, "p")
    after.close()
    assert listed(tmp_path) == ["1.500000 00000000.ts", "0.750000 00000001.ts", "|", "0.750000 00000002.ts"]


def test_old_segments_go_and_the_playlist_counts_them(tmp_path: Path) -> None:
    for run in range(2):
        sink = segments(tmp_path, keep=2)
        for index in range(2):
            sink.write(chunk(run * 2 + index), index, "p")
        sink.close()
    sink = segments(tmp_path, keep=2)
    sink.write(chunk(4), 0, "p")
    text = (tmp_path / "index.m3u8").read_text()
    assert sorted(path.name for path in tmp_path.glob("*.ts")) == ["00000003.ts", "00000004.ts"]
    assert "#EXT-X-MEDIA-SEQUENCE:3\n#EXT-X-DISCONTINUITY-SEQUENCE:1\n" in text
    assert listed(tmp_path) == ["0.750000 00000003.ts", "|", "0.750000 00000004.ts"]


@pytest.mark.parametrize(
    "text", ["#EXTM3U\n#EXTINF:4.0,\nmovie.ts\n", "# a comment\n", "not a playlist\n", "#EXTM3U\n00000001.ts\n"]
)
def test_a_foreign_playlist_is_left_alone(text: str, tmp_path: Path) -> None:
    (tmp_path / "index.m3u8").write_text(text)
    with pytest.raises(SinkError) as caught:
        segments(tmp_path)
    assert caught.value.code == "TP-5115"
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("index.m3u8", text)]


def test_a_foreign_file_under_a_segments_name_is_named(tmp_path: Path) -> None:
    (tmp_path / "00000000.ts").write_bytes(b"no video at all")
    with pytest.raises(SinkError, match=r"00000000\.ts: no MPEG-TS segment"):
        segments(tmp_path)


def test_a_full_disk_ends_the_sink_and_keeps_what_is_whole(tmp_path: Path) -> None:
    """A file-size limit makes the kernel refuse as a full disk does."""
    sinks = open_sinks(SinkConfig(kinds=("segments", "preview")), tmp_path, height=H, width=W)
    sinks.write(chunk(0), 0, "p")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = np.random.default_rng(0).integers(0, 256, (12, H, W, 3), dtype=np.uint8)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        with pytest.raises(SinkError, match="no room to write") as caught:
            sinks.write(noise, 1, "p")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.code == "TP-5102"
    assert sorted(os.listdir(tmp_path / "segments")) == ["00000000.ts", "index.m3u8"]
    assert listed(tmp_path / "segments") == ["0.750000 00000000.ts"]
    assert len(play(tmp_path / "segments" / "00000000.ts")) == 12
    assert sorted(os.listdir(tmp_path)) == ["preview.png", "segments"]


WRITES_FOR_EVER = """
import itertools, sys
from pathlib import Path
import numpy as np
from engine.config import SinkConfig
from engine.sinks.base import open_sinks
sinks = open_sinks(SinkConfig(kinds=("segments", "preview"), segment_s=float(sys.argv[2])), Path(sys.argv[1]),
                   height=32, width=48)
for index in itertools.count():
    sinks.write(np.full((12, 32, 48, 3), 20 + index % 200, np.uint8), index, "p")
"""


@pytest.mark.parametrize("segment_s", [0.0, 3.0])
def test_kill_9_leaves_every_whole_chunk_playable(segment_s: float, tmp_path: Path) -> None:
    directory = tmp_path / "segments"
    process = subprocess.Popen([sys.executable, "-c", WRITES_FOR_EVER, str(tmp_path), str(segment_s)])
    try:
        wait_for(lambda: len(list(directory.glob("*.ts"))) >= 4, "four segments")
    finally:
        process.kill()
        assert process.wait(DEADLINE_S) == -signal.SIGKILL
    names = sorted(path.name for path in directory.glob("*.ts"))
    assert names == [f"{number:08d}.ts" for number in range(len(names))]
    greys = [grey for name in names for _, grey in play(directory / name)]
    assert len(greys) % 12 == 0  # whole chunks alone
    assert all(abs(grey - 20 - n // 12) <= 2 for n, grey in enumerate(greys))
    assert len(listed(directory)) >= len(names) - 1
    assert all(entry.split()[1] in names for entry in listed(directory))
    from PIL import Image

    with Image.open(tmp_path / "preview.png") as image:
        image.load()
        assert int(image.text["chunk_index"]) in (len(greys) // 12 - 1, len(greys) // 12 - 2)
    assert len(segments(directory)._playlist.segments) == len(names)  # and a restarted job goes on from there


# Preview --------------------------------------------------------------------------------------------------------------


def test_the_preview_shows_the_newest_chunk_and_stays_whole(tmp_path: Path) -> None:
    from PIL import Image

    sink = PreviewSink(tmp_path / "preview.png")
    assert sink.close() is None
    for index in range(3):
        sink.write(chunk(index), index, "狐狸 in the snow")
        with Image.open(tmp_path / "preview.png") as image:
            assert (image.size, image.getpixel((0, 0))) == ((W, H), (20 + 25 * index,) * 3)
            assert image.text == {"chunk_index": str(index), "prompt": "狐狸 in the snow"}
    sink.abort()
    assert sink.close() == tmp_path / "preview.png"
    assert os.listdir(tmp_path) == ["preview.png"]


# Pipe -----------------------------------------------------------------------------------------------------------------


def pipe(directory: Path, no_reader: str = "discard") -> PipeSink:
    return PipeSink(directory / "frames.rgb", directory / "pipe.json", height=H, width=W, fps=FPS, no_reader=no_reader)


@contextmanager
def reader(path: Path, waits: bool = False) -> Iterator[int]:
    """A reading end; one that `waits` is there when the writer is, as a player's is."""
    descriptor = os.open(path, os.O_RDONLY if waits else os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read(descriptor: int, size: int) -> bytes:
    parts = []
    while size and (part := os.read(descriptor, size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def test_a_reader_gets_the_very_frames_and_is_told_what_they_are(tmp_path: Path) -> None:
    sink = pipe(tmp_path, "wait")
    said = json.loads((tmp_path / "pipe.json").read_text())
    assert (said["width"], said["height"], said["fps"], said["pixel_format"]) == (W, H, FPS, "rgb24")
    assert stat.S_IMODE((tmp_path / "frames.rgb").stat().st_mode) == 0o600
    pixels = np.random.default_rng(0).integers(0, 256, (40, H, W, 3), dtype=np.uint8)  # more than a pipe holds
    thread = threading.Thread(target=lambda: (sink.write(pixels, 0, "p"), sink.close()))
    thread.start()
    with reader(Path(said["pipe"]), waits=True) as descriptor:
        got = read(descriptor, pixels.nbytes + 1)  # up to the end of the stream
        thread.join(DEADLINE_S)
    assert got == pixels.tobytes()
    assert said["frame_bytes"] * 40 == len(got)
    assert sink.chunks_unread == 0
    assert os.listdir(tmp_path) == []


def test_without_a_reader_frames_go_nowhere_and_a_late_one_begins_with_a_frame(tmp_path: Path) -> None:
    """The first reader leaves in the middle of a frame, with more of it still in the pipe: no SIGPIPE, and no rest."""
    sink = pipe(tmp_path)
    sink.write(chunk(0), 0, "p")
    assert sink.chunks_unread == 1
    with reader(sink.path) as first:
        sink.write(chunk(1, 2), 1, "p")
        assert read(first, 100) == bytes([45]) * 100
    sink.write(chunk(2, 2), 2, "p")
    assert sink.chunks_unread == 2
    with reader(sink.path) as second:
        sink.write(chunk(3, 2), 3, "p")
        assert read(second, 2 * H * W * 3) == bytes([95]) * (2 * H * W * 3)
    sink.close()


@pytest.mark.parametrize("comes", [False, True], ids=["never-came", "went-away"])
def test_a_job_that_needs_its_reader_ends_without_one(comes: bool, tmp_path: Path) -> None:
    sink = pipe(tmp_path, "fail")
    if comes:
        with reader(sink.path):
            sink.write(chunk(0, 2), 0, "p")
    with pytest.raises(SinkError, match="lost its reader" if comes else "has no reader") as caught:
        sink.write(chunk(1), 1, "p")
    assert (caught.value.code, caught.value.evidence["had_reader"]) == ("TP-5117", comes)


def test_a_pipe_that_waits_for_its_reader_waits_and_can_be_interrupted(tmp_path: Path) -> None:
    sink = pipe(tmp_path, "wait")
    thread = threading.Thread(target=sink.write, args=(chunk(0, 2), 0, "p"))
    thread.start()
    with reader(sink.path, waits=True) as descriptor:
        assert read(descriptor, 2 * H * W * 3) == chunk(0, 2).tobytes()
    thread.join(DEADLINE_S)
    sink.write(chunk(1, 2), 1, "p")  # finds out that the reader has gone
    thread = threading.Thread(target=sink.write, args=(chunk(2, 2), 2, "p"))
    thread.start()
    sink.interrupt()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


def test_what_is_in_the_way_of_a_pipe_stays(tmp_path: Path) -> None:
    (tmp_path / "frames.rgb").write_text("a file")
    with pytest.raises(SinkError) as caught:
        pipe(tmp_path)
    assert caught.value.code == "TP-5116"
    assert (tmp_path / "frames.rgb").read_text() == "a file"
    (tmp_path / "frames.rgb").unlink()
    os.mkfifo(tmp_path / "frames.rgb", 0o644)  # of a job that was killed: used again, for this user alone
    assert stat.S_IMODE(pipe(tmp_path).path.stat().st_mode) == 0o600


# The writer -----------------------------------------------------------------------------------------------------------


class Gate:
    """A sink that is as slow as its test wants: each write waits for one permit."""

    def __init__(self) -> None:
        self.permits = threading.Semaphore(0)
        self.busy = threading.Event()
        self.wrote: list[int] = []
        self.ended = ""

    def write(self, pixels_THWC: np.ndarray, chunk_index: int, prompt: str) -> None:
        self.busy.set()
        assert self.permits.acquire(timeout=DEADLINE_S)
        self.wrote.append(chunk_index)

    def close(self) -> None:
        self.ended = "closed"

    def abort(self) -> None:
        self.ended = "aborted"


class Told:
    """What a writer says to its job."""

    def __init__(self) -> None:
        self.written: list[int] = []
        self.dropped: list[int] = []
        self.failures: list[SinkError] = []
        self.stuck: list[str] = []


def gated(on_slow: str, queue_chunks: int = 2) -> tuple[SinkWriter, Gate, Told]:
    gate, told = Gate(), Told()
    writer = SinkWriter(
        SinkSet({"gate": gate}, height=H, width=W),
        SinkConfig(on_slow=on_slow, queue_chunks=queue_chunks),
        written=told.written.append,
        dropped=told.dropped.append,
        failed=told.failures.append,
        stuck=told.stuck.append,
    )
    writer.put(chunk(0), 0, "p")
    assert gate.busy.wait(DEADLINE_S)  # chunk 0 is being written, and those that follow wait
    for index in range(1, 1 + queue_chunks):
        writer.put(chunk(index), index, "p")
    return writer, gate, told


def test_block_holds_the_stream_back_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "STUCK_S", 0.05)
    writer, gate, told = gated("block")
    thread = threading.Thread(target=writer.put, args=(chunk(3), 3, "p"))
    thread.start()
    wait_for(lambda: told.stuck, "the wait is told")
    assert thread.is_alive()
    assert re.fullmatch(r"sink gate: writing chunk 0 for \d+\.\d s, 2 more chunk\(s\) wait", str(writer.blocker()))
    gate.permits.release(4)
    thread.join(DEADLINE_S)
    assert writer.close() == {}
    assert told.written == gate.wrote == [0, 1, 2, 3]
    assert (told.dropped, told.failures, set(told.stuck), gate.ended) == ([], [], {"gate"}, "closed")
    assert (writer.facts()["most_queued"], writer.blocker()) == (2, None)


def test_drop_oldest_never_waits_and_names_what_it_dropped() -> None:
    writer, gate, told = gated("drop-oldest")
    for index in range(3, 7):
        writer.put(chunk(index), index, "p")  # comes back while the gate is shut
    gate.permits.release(7)
    writer.close()
    assert (told.written, told.dropped) == ([0, 5, 6], [1, 2, 3, 4])
    assert writer.facts()["most_queued"] == 2


def test_fail_says_so_once_and_the_rest_is_still_written() -> None:
    writer, gate, told = gated("fail", queue_chunks=1)
    thread = threading.Thread(target=lambda: [writer.put(chunk(index), index, "p") for index in (2, 3)])
    thread.start()
    wait_for(lambda: told.failures, "the failure is told")
    gate.permits.release(4)
    thread.join(DEADLINE_S)
    writer.close()
    (failure,) = told.failures
    assert failure.code == "TP-5110"
    assert "sink gate: writing chunk 0" in failure.message
    assert (told.written, told.dropped) == ([0, 1, 2, 3], [])


def test_a_broken_sink_ends_the_next_put_and_the_close(tmp_path: Path) -> None:
    sinks = open_sinks(SinkConfig(kinds=("raw",)), tmp_path, height=H, width=W)
    told = Told()
    writer = SinkWriter(
        sinks, SinkConfig(), written=told.written.append, dropped=told.dropped.append, failed=told.failures.append
    )
    writer.put(chunk(0)[:, :16], 0, "p")  # half a frame
    with pytest.raises(SinkError, match="must be uint8"):
        writer.close()
    with pytest.raises(SinkError, match="must be uint8"):
        writer.put(chunk(1), 1, "p")
    assert (told.written, os.listdir(tmp_path)) == ([], [])


def test_abort_interrupts_a_pipe_that_nobody_reads(tmp_path: Path) -> None:
    sinks = open_sinks(SinkConfig(kinds=("raw", "pipe")), tmp_path, height=H, width=W)
    told = Told()
    config = SinkConfig(kinds=("raw", "pipe"))
    writer = SinkWriter(
        sinks, config, written=told.written.append, dropped=told.dropped.append, failed=told.failures.append
    )
    with reader(tmp_path / "frames.rgb"):
        writer.put(chunk(0, 100), 0, "p")
        wait_for(lambda: (writer.blocker() or "").startswith("sink pipe"), "the pipe is full")
        writer.put(chunk(1), 1, "p")
        writer.abort()
    assert (told.written, os.listdir(tmp_path)) == ([], [])
    assert not writer._thread.is_alive()
