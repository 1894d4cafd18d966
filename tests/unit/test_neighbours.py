"""Which of the other ranks are processes of this host, and what became of them."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from engine.comm.neighbours import Neighbours, introduction
from engine.process import Process

OWN = introduction()


def of_child(pid: int) -> bytes:
    place, _ = OWN.split(b" ")
    return b"%s %s" % (place, str(Process.of(pid)).encode())


def test_a_peer_that_lives_stops_and_ends_is_told_apart() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            found = Neighbours.read(0, {0: OWN, 1: of_child(child.pid)})
            assert (found.gone(), found.stopped()) == ([], [])
            child.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
            assert (found.gone(), found.stopped()) == ([], [1])
        finally:
            child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie is gone, whether it was waited for or not
        assert (found.gone(), found.stopped()) == ([1], [])
    assert found.gone() == [1]


@pytest.mark.parametrize(
    "word",
    [b"another-boot/pid:[1] 4242:17", b"1", b"", b"\xff\xfe 1:2", OWN + b":3", OWN.replace(b" ", b" -", 1)],
    ids=["another host", "another version", "nothing", "no text", "too much", "no number"],
)
def test_of_a_rank_that_is_not_known_to_be_here_nothing_is_said(word: bytes) -> None:
    assert Neighbours.read(0, {0: OWN, 1: word}).processes == {}


def test_an_id_that_was_given_to_another_process_means_gone() -> None:
    place, _ = OWN.split(b" ")
    later = Process(os.getpid(), Process.of(os.getpid()).start_ticks - 1)
    found = Neighbours.read(0, {0: OWN, 1: b"%s %s" % (place, str(later).encode())})
    assert found.gone() == [1]
