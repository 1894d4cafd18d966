"""Two referees with a rank each, as on two hosts, meeting at the store of the job."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.referee.snapshot import Life
from engine.referee.summary import Summary, decode, decode_verdict, encode
from tests.cpu.test_referee import waits_at_the_odd_round
from tests.support.ranks import Job, free_port, start_ranks
from tests.support.refereed import Beside
from tests.unit.test_referee import ended, gone, inside, seat

GONE_S = 5.0  # far above what is measured, far below any timeout of the ranks


@contextmanager
def two_hosts(tmp_path: Path, how: str, *, store: bool = True) -> Iterator[tuple[Job, list[Beside]]]:
    """`lockstep` ranks, a store as a launcher would hold it, and a referee for each rank alone."""
    import torch.distributed as dist

    port = free_port()
    held = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False) if store else None
    with ExitStack() as stack:
        referees = []
        for rank in (0, 1):
            host = tmp_path / f"host{rank}"
            host.mkdir()
            with (host / "referee.log").open("wb") as log:
                command = ["-m", "engine.referee", "--run-dir", str(tmp_path), "--ranks", str(rank)]
                command += ["--record", str(host / "referee.json")]
                command += ["--store", f"127.0.0.1:{port}"] if store else []
                process = subprocess.Popen([sys.executable, *command], stderr=log)
            stack.callback(process.wait, 10)
            stack.callback(process.kill)
            referees.append(Beside(host, process))
        if held is not None:
            met = dist.PrefixStore("tpctl/referee/job/0", held)
            end = time.monotonic() + 60
            while met.add("hosts", 0) < 2:
                assert time.monotonic() < end, [beside.said for beside in referees]
        entry = ("-m", "tests.support.lockstep", "--how", how)
        yield stack.enter_context(start_ranks(tmp_path, EngineConfig(), world_size=2, entry=entry)), referees
    del held


def both(referees: list[Beside]) -> list[dict]:
    records = [beside.record for beside in referees]
    assert None not in records, [beside.said for beside in referees]
    first, second = (record["verdict"] for record in records if record)
    assert first == second
    return [record for record in records if record]


@pytest.mark.parametrize(("how", "kind", "fm"), [("extra", "mismatch", "FM-03"), ("wrong-group", "deadlock", "FM-22")])
def test_what_two_hosts_did_to_each_other_is_proved_and_both_say_the_same(
    how: str, kind: str, fm: str, tmp_path: Path
) -> None:
    with two_hosts(tmp_path, how) as (job, referees):
        assert [beside.leave(60) for beside in referees] == [1, 1], [beside.said for beside in referees]
        job.end(GONE_S)
        records = both(referees)
    print([record["times"] for record in records])  # shown by -rP
    assert (records[0]["verdict"]["kind"], records[0]["verdict"]["fm"]) == (kind, fm)
    assert "rank 0" in records[0]["verdict"]["message"]
    assert "rank 1" in records[0]["verdict"]["message"]
    assert [record["killed"] for record in records] == [[0], [1]]


@pytest.mark.parametrize("how", ["extra", "wrong-group"])
def test_without_the_store_neither_host_sees_anything(how: str, tmp_path: Path) -> None:
    with two_hosts(tmp_path, how, store=False) as (job, referees):
        boxes = [tmp_path / "ranks" / f"rank{rank}.blackbox" for rank in range(2)]
        job.wait_for(lambda: all(waits_at_the_odd_round(box) for box in boxes), "both ranks wait", 60)
        for process in job.processes.values():
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1.5)
        assert [beside.record for beside in referees] == [None, None]


@pytest.mark.parametrize(("how", "kind"), [(signal.SIGKILL, "lost"), (signal.SIGSTOP, "frozen")])
def test_a_rank_of_the_other_host_is_named_and_ours_is_ended(how: signal.Signals, kind: str, tmp_path: Path) -> None:
    with two_hosts(tmp_path, "slow") as (job, referees):
        box = tmp_path / "ranks" / "rank0.blackbox"
        job.wait_for(lambda: waits_at_the_odd_round(box), "rank 0 waits for rank 1", 60)
        job.processes[1].send_signal(how)
        since = time.monotonic()
        for process in job.processes.values():
            process.wait(GONE_S)
        gone_s = time.monotonic() - since
        assert [beside.leave(20) for beside in referees] == [1, 1]
        records = both(referees)
    print(f"{kind}: gone after {gone_s:.3f} s")
    assert (records[0]["verdict"]["kind"], records[0]["verdict"]["triggers"]) == (kind, [1])


def test_a_healthy_job_over_two_hosts_gets_no_verdict(tmp_path: Path) -> None:
    with two_hosts(tmp_path, "slow") as (job, referees):
        outcome = job.end(90)
        assert [beside.leave() for beside in referees] == [0, 0], [beside.said for beside in referees]
    assert outcome.exit_codes == {0: 0, 1: 0}, outcome.stderr
    assert [beside.record for beside in referees] == [None, None]


def test_a_summary_comes_back_as_it_went() -> None:
    seats = (inside(0, 5), ended(1, 70, 2, evidence={"minority": [1]}), gone(2), seat(3, life=Life.STOPPED))
    summary = Summary("host-a", 7, 99, seats, {2: 41}, leaving=True)
    assert decode(encode(summary)) == summary


GOOD = encode(Summary("host-a", 7, 99, (inside(0, 5),), {}))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b"[" * 100_000,
        GOOD.replace(b'"v":1', b'"v":2'),
        GOOD.replace(b'"look":7', b'"look":-7'),
        GOOD.replace(b'"look":7', b'"look":true'),
        GOOD.replace(b'"rank":0', b'"rank":1e99'),
        GOOD.replace(b'"life":"alive"', b'"life":"undead"'),
        GOOD.replace(b'"groups":[0', b'"groups":[9'),
        GOOD[:-10],
        GOOD + b" " * (1 << 18),
    ],
)
def test_a_summary_that_does_not_fit_is_refused(raw: bytes) -> None:
    assert raw != GOOD
    for read in (decode, lambda data: decode_verdict(data, 0)):
        with pytest.raises(ValueError, match=r"."):
            read(raw)
