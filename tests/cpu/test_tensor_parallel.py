"""The generator over real processes: the same flow as one process, and the same collectives on every rank."""

from __future__ import annotations

import datetime
import multiprocessing
import time
from pathlib import Path

import pytest
import torch

from engine.comm.group import Group, Rank
from tests.cpu.oracle import TINY, build, caches, draw, seeded_state

JOIN_S = 90.0
TOKENS = 12

# start_frame, bias, recompute, reset of the text cache first
CALLS = (
    (0, 1.0, False, True),
    (0, 1.0, False, False),
    (3, 0.3, False, False),
    (6, 0.3, False, True),
    (0, 1.0, True, False),
    (3, 0.3, False, False),
)


def run_calls(mesh: Group) -> tuple[list[torch.Tensor], list[int], int]:
    """Flows, collectives of each call, and the ledger's hash."""
    torch.set_num_threads(1)
    dit = build(TINY, seeded_state(TINY), mesh)
    kv, cross = caches(TINY, TOKENS, window=6, sink=1, tp=mesh.size)
    flows, counts = [], []
    for number, (start, bias, recompute, new_text) in enumerate(CALLS):
        if new_text:
            cross.reset()
        before = mesh.ledger.count
        x = draw(1, 3, TINY.in_dim, 6, 8, seed=number)
        text = draw(1, 20, TINY.text_dim, seed=50 + number)
        step = torch.full((3,), 0 if recompute else 1000 - 100 * number)
        flow = dit(x, step, text, kv=kv, cross=cross, start_frame=start, bias=bias, recompute=recompute)
        flows.append(flow)
        counts.append(mesh.ledger.count - before)
    return flows, counts, mesh.ledger.value()


def rank_main(rank: int, size: int, directory: str) -> None:
    import torch.distributed as dist

    store = dist.FileStore(f"{directory}/store", size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=JOIN_S / 2)
    )
    members = tuple(Rank(r) for r in range(size))
    flows, counts, ledger = run_calls(Group("mesh_pg", members, Rank(rank), dist.group.WORLD))
    torch.save({"flows": flows, "counts": counts, "ledger": ledger}, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 4])
def test_a_mesh_computes_what_one_process_computes(tmp_path: Path, size: int) -> None:
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=rank_main, args=(rank, size, str(tmp_path))) for rank in range(size)]
    try:
        for process in ranks:
            process.start()
        deadline = time.monotonic() + JOIN_S
        for process in ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        assert [process.exitcode for process in ranks] == [0] * size
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
                process.join()
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(size)]
    want, counts, ledger = run_calls(Group.solo())
    blocks = 5 * TINY.num_layers
    assert counts == [blocks + int(new_text) for _, _, _, new_text in CALLS]
    for rank, result in enumerate(results):
        assert result["counts"] == counts, f"rank {rank}"
        assert result["ledger"] == results[0]["ledger"]
        for number, (flow, reference) in enumerate(zip(result["flows"], want, strict=True)):
            error = ((flow - reference).norm() / reference.norm()).item()
            assert error <= 1e-4, f"rank {rank}, call {number}"
            assert torch.equal(flow, results[0]["flows"][number]), f"rank {rank} differs from rank 0 in call {number}"
    assert ledger == results[0]["ledger"], "one process makes the same calls, on a group of one"
