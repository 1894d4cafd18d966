"""A rank that makes collectives through `Group`, over real gloo, and goes wrong as told: no engine, nothing else.

RANK=0 WORLD_SIZE=2 MASTER_PORT=... python -m tests.support.lockstep --run-dir DIR --how extra
"""

from __future__ import annotations

import argparse
import datetime
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.blackbox import BlackBox
    from engine.report import RankReport

ROUNDS = 40
ODD_ROUND = 20


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--config")  # what a launcher passes; nothing here needs it
    parser.add_argument("--how", required=True)
    parser.add_argument("--odd-rank", type=int, default=1)
    options = parser.parse_args()
    rank = int(os.environ["RANK"])

    from engine.blackbox import BlackBox
    from engine.failures import guard
    from engine.report import RankReport

    ranks = options.run_dir / "ranks"
    ranks.mkdir(exist_ok=True)
    box = BlackBox(ranks / f"rank{rank}.blackbox", rank)
    report = RankReport(ranks / f"rank{rank}.json", rank, on_move=box.enter_state)
    return guard(lambda: run(options.how, rank, rank == options.odd_rank, box, report), report)


def run(how: str, rank: int, odd: bool, box: BlackBox, report: RankReport) -> None:
    import torch
    import torch.distributed as dist

    from engine.comm.group import Group, PhaseGate, Rank
    from engine.lifecycle import RankState

    size = int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    report.move(RankState.JOINING)
    store = dist.TCPStore(
        "127.0.0.1", int(os.environ["MASTER_PORT"]), size, is_master=rank == 0, timeout=datetime.timedelta(seconds=60)
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=120))
    mesh_pg = dist.new_group(list(range(size)))
    gate = PhaseGate(blackbox=box)
    members = tuple(Rank(r) for r in range(size))
    world = Group("world_pg", members, Rank(rank), dist.group.WORLD, gate)
    mesh = Group("mesh_pg", members, Rank(rank), mesh_pg, gate)
    for state in (RankState.LOADING, RankState.WARMING, RankState.RUNNING):
        report.move(state)
    for number in range(ROUNDS):
        gate.ids = {"call_id": number, "chunk_index": number, "cache_epoch": 0}
        here = odd and number == ODD_ROUND
        if here and how == "extra":
            mesh.all_gather(torch.zeros(3, dtype=torch.int64))  # planted: extra
        if here and how == "leave":
            break
        if here and how == "slow":
            product = torch.eye(600)
            for _ in range(150):  # a rank that takes its time, while its peer waits
                product = product @ product
        if here and how == "wrong-group":
            world.all_reduce(torch.zeros(8))  # planted: wrong group
        else:
            mesh.all_reduce(torch.zeros(8))  # planned
    for state in (RankState.DRAINING, RankState.SHUTDOWN):
        report.move(state)


if __name__ == "__main__":
    code = main()
    os._exit(code)  # as the worker does: the backend's destructors may wait for peers
