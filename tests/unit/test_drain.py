"""A drain is asked for, taken back, asked for again, and begun: from then on it cannot be taken back."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import os, signal, sys, threading
from engine.drain import DrainRequest
heard = threading.Semaphore(0)
taken = []
request = DrainRequest(lambda name: heard.release(), lambda name: os._exit(3), lambda: taken.append(1))
def ask():
    os.kill(os.getpid(), signal.SIGTERM)
    assert heard.acquire(timeout=20)
print(request.take_back())
ask()
print(request.requested, request.take_back(), request.requested, len(taken), request.begin())
ask()  # no second signal: the first was taken back
print(request.begin(), request.take_back(), len(taken))
sys.stdout.flush()
os._exit(0)
"""


def test_a_drain_can_be_taken_back_until_it_is_begun() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    assert first == "no drain is under way"
    assert second == "True None False 1 False"
    assert third.startswith("True it is past its point of no return")
    assert third.endswith(" 1")


def test_a_stream_that_ends_by_itself_drains_no_more() -> None:
    code = (
        "import os, sys\nfrom engine.drain import DrainRequest\n"
        "request = DrainRequest(print, print)\nprint(request.begin(), request.begin(ended=True), request.take_back())\n"
        "sys.stdout.flush()\nos._exit(0)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert said.startswith("False True it is past its point")
