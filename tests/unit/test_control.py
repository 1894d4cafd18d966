"""The control socket: every request is answered, none is applied twice, and nothing that is written to it harms it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.control import (
    MAX_CLIENTS,
    MAX_LINE_BYTES,
    MAX_WAITING,
    REMEMBERED,
    ControlError,
    ControlSocket,
    SteeredTimeline,
    Steering,
)
from engine.timeline import Event, Timeline
from tpctl.errors import RefusedError
from tpctl.jobs.line import Line
from tpctl.jobs.place import JobDir


def line(**changes: object) -> bytes:
    request = {"v": 1, "id": "a", "op": "steer", "prompt": "a fox"} | changes
    return json.dumps({key: value for key, value in request.items() if value is not None}).encode()


def receipt(name: str) -> bytes:
    return json.dumps({"v": 1, "id": name, "op": "receipt"}).encode()


@pytest.fixture
def server(tmp_path):
    steering = Steering()
    control = ControlSocket(tmp_path / "c.sock", steering)
    yield tmp_path / "c.sock", steering
    control.close()
    assert not (tmp_path / "c.sock").exists()


def connect(path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(20)
    client.connect(str(path))
    return client


def test_a_request_is_received_applied_and_shown():
    steering = Steering()
    assert steering.answer(line()) == {"v": 1, "id": "a", "ok": True, "state": "received", "chunk_index": None}
    assert steering.take(7, Event(7)) == Event(7, "a fox")
    assert (steering.answer(receipt("a"))["state"], steering.answer(receipt("a"))["chunk_index"]) == ("applied", 7)
    steering.shown(6)
    assert steering.answer(receipt("a"))["state"] == "applied"
    steering.shown(8)  # chunk 7 was dropped: what it changed is seen in the next one
    assert steering.answer(receipt("a"))["state"] == "shown"


def test_a_repeated_id_does_nothing():
    steering = Steering()
    steering.answer(line())
    steering.take(3, Event(3))
    assert steering.answer(line(prompt="another"))["chunk_index"] == 3
    assert steering.take(4, Event(4)) == Event(4)


def test_later_requests_go_over_earlier_ones_and_over_the_timeline():
    steering = Steering()
    steering.answer(line(id="1", cut=True, bias=0.5))
    steering.answer(line(id="2", prompt="a bear", recompute=False))
    planned = Event(2, prompt="planned", bias=0.9, recompute=True)
    assert steering.take(2, planned) == Event(2, "a bear", True, 0.5, False)


def test_the_event_of_a_chunk_is_fixed_when_it_is_asked_for_first():
    steering = Steering()
    timeline = SteeredTimeline(Timeline.of_prompt("first"), steering)
    assert timeline.at(0) == Event(0, "first")
    steering.answer(line(cut=True))
    assert timeline.at(0) == Event(0, "first")
    assert timeline.at(1) == timeline.at(1) == Event(1, "a fox", True)
    assert timeline.at(2) == Event(2)


def test_a_pause_holds_the_chunk_that_its_receipt_names_and_what_is_steered_meanwhile_waits():
    steering = Steering()
    assert not steering.holds(4)
    assert steering.answer(line(id="p", prompt=None, paused=True))["state"] == "received"
    assert steering.holds(5)
    assert (steering.answer(receipt("p"))["state"], steering.answer(receipt("p"))["chunk_index"]) == ("held", 5)
    steering.answer(line(id="q"))
    assert steering.answer(receipt("q"))["state"] == "received"
    assert steering.answer(line(id="r", prompt=None, paused=False))["state"] == "received"
    assert not steering.holds(5)
    assert steering.take(5, Event(5)) == Event(5, "a fox")
    steering.shown(5)
    assert [steering.answer(receipt(name))["state"] for name in "pqr"] == ["held", "shown", "shown"]
    assert steering.answer(receipt("r"))["chunk_index"] == 5
    steering.answer(line(id="s", paused=True))
    assert steering.holds(6)
    assert steering.answer(receipt("s"))["state"] == "held"
    assert steering.take(6, Event(6)) == Event(6, "a fox")  # once the pause is over
    assert steering.answer(receipt("s"))["state"] == "applied"


def test_a_pause_ends_the_wait_of_the_loop_when_it_ends():
    steering = Steering()
    steering.answer(line(id="p", prompt=None, paused=True))
    loop = threading.Thread(target=steering.wait, args=(60.0,))
    loop.start()
    steering.answer(line(id="r", prompt=None, paused=False))
    loop.join(30)
    assert not loop.is_alive()


def test_a_drain_is_taken_back_once_and_a_refusal_says_why():
    said = ["it is past its point of no return", None]
    asked = []
    steering = Steering(take_back=lambda: asked.append(1) or said.pop())
    order = json.dumps({"v": 1, "id": "d", "op": "take-back"}).encode()
    assert steering.answer(order)["state"] == "taken back"
    assert steering.answer(order)["state"] == "taken back"
    assert len(asked) == 1
    refused = steering.answer(order.replace(b'"d"', b'"e"'))
    assert (refused["ok"], refused["code"]) == (False, "TP-7850")
    assert "no return" in refused["message"]


BAD = [
    (b"", "TP-6503"),
    (b"{", "TP-6503"),
    (b"[]", "TP-6503"),
    (b"\xff\xfe", "TP-6503"),
    (b"[" * 5000, "TP-6503"),
    (b'{"v": 1, "id": "a", "op": "steer", "bias": NaN}', "TP-6503"),
    (line(v=2), "TP-6502"),
    (line(v=None), "TP-6502"),
    (line(v=True), "TP-6502"),
    (line(id="two words"), "TP-6503"),
    (line(id=7), "TP-6503"),
    (line(op="exec"), "TP-6503"),
    (line(shell="ls"), "TP-6503"),
    (line(prompt=" "), "TP-6503"),
    (line(prompt="x" * 4097), "TP-6503"),
    (line(prompt="\ud800"), "TP-6503"),
    (line(prompt=None), "TP-6503"),
    (line(prompt=None, cut=False), "TP-6503"),
    (line(bias=0), "TP-6503"),
    (line(bias=1.5), "TP-6503"),
    (line(bias=True), "TP-6503"),
    (line(cut="yes"), "TP-6503"),
    (line(paused=1), "TP-6503"),
    (receipt("unheard"), "TP-6504"),
]


@pytest.mark.parametrize(("text", "code"), BAD, ids=range(len(BAD)))
def test_a_bad_request_is_refused_and_changes_nothing(text, code):
    steering = Steering()
    answer = steering.answer(text)
    assert (answer["ok"], answer["code"]) == (False, code)
    assert steering.take(0, Event(0)) == Event(0)


def test_a_recompute_that_the_window_cannot_hold_is_refused():
    assert Steering(can_recompute=False).answer(line(recompute=True))["code"] == "TP-6506"


def test_what_waits_and_what_is_remembered_are_bounded():
    steering = Steering()
    for number in range(MAX_WAITING):
        assert steering.answer(line(id=f"w{number}"))["ok"]
    assert steering.answer(line(id="more"))["code"] == "TP-6505"
    for number in range(REMEMBERED):
        steering.holds(number)
        steering.take(number, Event(number))
        steering.answer(line(id=f"r{number}"))
    assert steering.answer(receipt("w0"))["code"] == "TP-6504"


def test_the_socket_is_its_owners_alone_and_answers_in_order(server):
    path, steering = server
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with connect(path) as client:
        client.sendall(b"".join(line(id=f"n{number}") + b"\n" for number in range(50)))
        with client.makefile("rb") as answers:
            assert [json.loads(answers.readline())["id"] for _ in range(50)] == [f"n{number}" for number in range(50)]
    assert steering.take(0, Event(0)).prompt == "a fox"


def test_an_oversized_request_is_refused_and_its_connection_closed(server):
    path, _ = server
    with connect(path) as client, client.makefile("rb") as answers:
        client.sendall(b"x" * (MAX_LINE_BYTES + 1))
        assert json.loads(answers.readline())["code"] == "TP-6508"
        assert answers.readline() == b""
    with connect(path) as other, other.makefile("rb") as answers:
        other.sendall(line() + b"\n")
        assert json.loads(answers.readline())["ok"]


OTHER_UID = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@contextlib.contextmanager
def as_another_user(code: str, directory: Path) -> Iterator[subprocess.Popen[str]]:
    """A bare Python process of another user; `{path}` is the socket in a directory that it may use."""
    directory.chmod(0o777)
    become = f"import os, socket\nos.setgroups([])\nos.setgid({OTHER_UID})\nos.setuid({OTHER_UID})\n"
    text = become + code.format(path=str(directory / "control.sock"))
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/"
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ValueError):  # it was read to its end already
            process.communicate(timeout=60)


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A directory that another user can reach, unlike those of pytest."""
    with tempfile.TemporaryDirectory(prefix="tpctl-") as name:
        yield Path(name)


@as_root
def test_another_user_is_refused_even_where_the_files_would_let_him_in(open_place):
    steering = Steering()
    control = ControlSocket(open_place / "control.sock", steering)
    (open_place / "control.sock").chmod(0o666)
    code = (
        "client = socket.socket(socket.AF_UNIX)\nclient.settimeout(20)\nclient.connect({path!r})\n"
        "line = client.makefile('rb').readline()\nprint(line.decode())\n"
    )
    try:
        with as_another_user(code, open_place) as process:
            said, _ = process.communicate(timeout=60)
            answer = json.loads(said)
    finally:
        control.close()
    assert (answer["ok"], answer["code"]) == (False, "TP-7852")
    assert str(OTHER_UID) in answer["message"]
    assert steering.counts == {}


@as_root
def test_a_socket_of_another_user_is_not_spoken_to(open_place):
    code = (
        "server = socket.socket(socket.AF_UNIX)\nserver.bind({path!r})\nserver.listen()\n"
        "print('ready', flush=True)\nserver.settimeout(20)\nclient, _ = server.accept()\nclient.settimeout(20)\n"
        "print(client.recv(100))\n"
    )
    with as_another_user(code, open_place) as process:
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(RefusedError, match=f"user {OTHER_UID}'s, not yours"):
            Line(JobDir(open_place))
        said, _ = process.communicate(timeout=60)
    assert said.strip() == "b''"


def test_a_connection_too_many_is_told_so(server):
    path, _ = server
    with contextlib.ExitStack() as stack:
        for number in range(MAX_CLIENTS):
            client = stack.enter_context(connect(path))
            client.sendall(line(id=f"c{number}") + b"\n")
            assert json.loads(client.makefile("rb").readline())["ok"]
        late = stack.enter_context(connect(path))
        assert json.loads(late.makefile("rb").readline())["code"] == "TP-7853"


def test_ten_thousand_random_and_mutated_requests_are_each_answered(server):
    path, steering = server
    dice = random.Random(20)
    seeds = [
        line(),
        receipt("a"),
        line(paused=True),
        line(op="take-back"),
        line(op="metrics"),
        line(cut=True, bias=0.5, recompute=False),
        *(text for text, _ in BAD),
    ]
    with connect(path) as client, client.makefile("rb") as answers:
        for number in range(10_000):
            text = bytearray(dice.choice(seeds)[:300])
            if number % 3 == 0:
                text = bytearray(dice.randbytes(dice.randrange(80)))
            for _ in range(dice.randrange(4)):
                if text:
                    text[dice.randrange(len(text))] = dice.randrange(256)
            client.sendall(bytes(text).replace(b"\n", b" ") + b"\n")
            answer = json.loads(answers.readline())
            assert answer["ok"] or answer["code"].startswith("TP-65")
            steering.take(number, Event(number))
        client.sendall(line(id="after") + b"\n")
        assert json.loads(answers.readline())["state"] == "received"


def test_a_path_that_cannot_be_bound_is_named(tmp_path):
    with pytest.raises(ControlError, match="cannot listen"):
        ControlSocket(tmp_path / "none" / "c.sock", Steering())
