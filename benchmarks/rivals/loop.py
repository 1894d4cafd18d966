"""One rank of a tensor-parallel loop as one writes it with torch.distributed, and the faults planted in it.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python -m benchmarks.rivals.loop --run-dir DIR --fault extra

A chunk: rank 0 broadcasts a header and a payload; then every rank runs its shard of a few blocks for a few steps, with
one all-reduce a block. Two groups: the default one for start-up, a mesh for the rest. With `--guarded` the same calls
go through the engine's `Group` and its black box. The rank leaves `rank{r}.pid`, the victim `inject` (monotonic ns)
at the moment of the fault, and who reaches the end `rank{r}.result.json`.

Shape legend: B batch, L tokens, D width, F hidden width of this rank's shard.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import time
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed

B, L, D, F = 1, 96, 64, 128
BLOCKS = 4
STEPS = 4

dist: Any = torch.distributed


class Collectives(Protocol):
    """What the loop needs of a group; `engine.comm.group.Group` has it too. Tensors are changed in place."""

    def broadcast(self, tensor: torch.Tensor) -> Any: ...
    def all_reduce(self, tensor: torch.Tensor) -> Any: ...
    def all_gather(self, tensor: torch.Tensor) -> Any: ...


class PlainGroup:
    """torch.distributed with its defaults."""

    def __init__(self, pg: Any) -> None:
        self._pg = pg

    def broadcast(self, tensor: torch.Tensor) -> None:
        dist.broadcast(tensor, src=0, group=self._pg)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        dist.all_reduce(tensor, group=self._pg)

    def all_gather(self, tensor: torch.Tensor) -> None:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor, group=self._pg)


class Plain:
    """Two groups, and nothing that watches them."""

    def __init__(self) -> None:
        dist.init_process_group("gloo")
        self.world: Collectives = PlainGroup(dist.group.WORLD)
        self.mesh: Collectives = PlainGroup(dist.new_group())

    def enter(self, phase: str, chunk: int) -> None:
        pass


class Guarded(Plain):
    """The engine's groups: a gate, a ledger, and a black box that a referee reads."""

    def __init__(self, rank: int, box: Any) -> None:
        from engine.comm.group import Group, PhaseGate, Rank

        dist.init_process_group("gloo")
        members = tuple(Rank(r) for r in range(dist.get_world_size()))
        self._gate = PhaseGate(blackbox=box)
        self.world = Group("world_pg", members, Rank(rank), dist.group.WORLD, self._gate)
        self.mesh = Group("mesh_pg", members, Rank(rank), dist.new_group(), self._gate)

    def enter(self, phase: str, chunk: int) -> None:
        from engine.comm.group import Phase

        self._gate.phase = Phase(phase)
        self._gate.ids = {"call_id": chunk, "chunk_index": chunk, "cache_epoch": 0}


class Loop:
    """The state of one rank. `fault` is planted in chunk `at`, on this rank if it is the victim."""

    def __init__(self, comm: Plain, rank: int, fault: str, at: int, run_dir: Path) -> None:
        self.comm = comm
        self.rank = rank
        self._fault = fault
        self._at = at
        self._run_dir = run_dir
        draw = torch.Generator().manual_seed(rank)
        self.up_DF = [torch.randn(D, F, generator=draw) / D**0.5 for _ in range(BLOCKS)]
        self.down_FD = [torch.randn(F, D, generator=draw) / F**0.5 for _ in range(BLOCKS)]
        self.past_BLD = torch.zeros(B, L, D)
        self._noise = torch.Generator().manual_seed(42)  # rank 0 draws, the others are told

    def chunk(self, number: int) -> None:
        self.comm.enter("link", number)
        if self._due(number, "freeze-receive"):
            os.kill(os.getpid(), signal.SIGSTOP)
        header_8 = torch.tensor([number, STEPS, B, L, D, 0, 0, 0]) if self.rank == 0 else torch.zeros(8).long()
        self.comm.mesh.broadcast(header_8)
        payload_BLD = torch.empty(B, L, D)
        if self.rank == 0:
            payload_BLD = torch.randn(B, L, D, generator=self._noise)
        self.comm.mesh.broadcast(payload_BLD)
        steps = int(header_8[1])
        if self._due(number, "extra"):
            steps += 1
        if self._due(number, "input"):
            payload_BLD[0, 0] += 1.0
        if self._due(number, "weight"):
            self.up_DF[1][0] += 0.5
        self.comm.enter("B", number)
        x_BLD = payload_BLD + self.past_BLD
        for step in range(steps):
            for block in range(BLOCKS):
                x_BLD = self._block(block, x_BLD, number if (step, block) == (1, 1) else -1)
        self.past_BLD = 0.5 * x_BLD

    def _block(self, block: int, x_BLD: torch.Tensor, number: int) -> torch.Tensor:
        """`number` is the chunk's at the one place where faults in mid-work come, else -1."""
        part_BLD = torch.relu(x_BLD @ self.up_DF[block]) @ self.down_FD[block]
        if self._due(number, "kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self._due(number, "freeze"):
            os.kill(os.getpid(), signal.SIGSTOP)
        if self._due(number, "conditional"):
            self.comm.mesh.all_gather(torch.tensor([number, block, 0]))
        if self._due(number, "ad-hoc"):
            self.comm.mesh.broadcast(torch.zeros(1))
        if self._due(number, "nan"):
            part_BLD[0, 0, 0] = float("nan")
        if self._due(number, "dtype"):
            other_BLD = (part_BLD * 1000).to(torch.int32)
            self.comm.mesh.all_reduce(other_BLD)
            part_BLD = other_BLD / 1000
        elif self._due(number, "wrong-group"):
            self.comm.world.all_reduce(part_BLD)
        else:
            self.comm.mesh.all_reduce(part_BLD)
        return torch.tanh(x_BLD + part_BLD)

    def _due(self, number: int, fault: str) -> bool:
        if number != self._at or fault != self._fault:
            return False
        mark = self._run_dir / "inject"
        mark.with_suffix(".new").write_text(str(time.monotonic_ns()))
        mark.with_suffix(".new").replace(mark)
        return True


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--fault", default="none")
    parser.add_argument("--victim", type=int, default=1)
    parser.add_argument("--at", type=int, default=10)
    parser.add_argument("--chunks", type=int, default=20)
    parser.add_argument("--guarded", action="store_true")
    options = parser.parse_args()
    rank = int(os.environ["RANK"])
    pid = options.run_dir / f"rank{rank}.pid"
    pid.with_suffix(".new").write_text(str(os.getpid()))
    pid.with_suffix(".new").replace(pid)
    torch.set_num_threads(1)
    if not options.guarded:
        work(Plain(), rank, options)
        dist.destroy_process_group()
        return 0
    return guarded(rank, options)


def work(comm: Plain, rank: int, options: argparse.Namespace) -> None:
    loop = Loop(comm, rank, options.fault if rank == options.victim else "none", options.at, options.run_dir)
    times_ms = []
    for number in range(options.chunks):
        started = time.perf_counter()
        loop.chunk(number)
        times_ms.append((time.perf_counter() - started) * 1e3)
    result = {
        "chunk_ms": statistics.median(times_ms[len(times_ms) // 4 :]),
        "finite": bool(torch.isfinite(loop.past_BLD).all()),
        "sum": float(loop.past_BLD.nan_to_num().double().abs().sum()),
    }
    (options.run_dir / f"rank{rank}.result.json").write_text(json.dumps(result))


def guarded(rank: int, options: argparse.Namespace) -> int:
    from engine.blackbox import BlackBox
    from engine.failures import guard
    from engine.lifecycle import RankState
    from engine.report import RankReport

    ranks = options.run_dir / "ranks"
    ranks.mkdir(exist_ok=True)
    box = BlackBox(ranks / f"rank{rank}.blackbox", rank)
    report = RankReport(ranks / f"rank{rank}.json", rank, on_move=box.enter_state)

    def run() -> None:
        report.move(RankState.JOINING)
        comm = Guarded(rank, box)
        for state in (RankState.LOADING, RankState.WARMING, RankState.RUNNING):
            report.move(state)
        work(comm, rank, options)
        for state in (RankState.DRAINING, RankState.SHUTDOWN):
            report.move(state)

    code = guard(run, report)
    os._exit(code)


if __name__ == "__main__":
    raise SystemExit(main())
