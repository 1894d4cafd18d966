"""Two real ranks over gloo for the length of one measurement."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

WORLD = 2
TIMEOUT_S = 60.0

Body = Callable[[int, Any, dict[str, Any]], Any]


def run_pair(body: Body, options: dict[str, Any], *, deadline_s: float) -> Any:
    """Run `body(rank, process_group, options)` on two ranks, one thread each; returns rank 0's answer (plain data).

    Raises:
        RuntimeError: a rank failed or did not finish by the deadline. No rank outlives this call.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the ranks, before they import torch
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        ends: list[Connection] = []
        processes = []
        try:
            for rank in range(WORLD):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(
                    target=_rank, args=(body, rank, options, str(Path(directory) / "store"), theirs), daemon=True
                )
                process.start()
                theirs.close()
                ends.append(ours)
                processes.append(process)
            return _answers(ends, deadline_s)[0]
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join(10)


def _answers(ends: list[Connection], deadline_s: float) -> list[Any]:
    deadline = time.monotonic() + deadline_s
    answers: dict[int, Any] = {}
    while len(answers) < len(ends):
        missing = {id(end): rank for rank, end in enumerate(ends) if rank not in answers}
        ready = wait([ends[rank] for rank in missing.values()], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RuntimeError(f"rank {', '.join(map(str, missing.values()))} did not finish in {deadline_s:g} s")
        for rank in [missing[id(end)] for end in ready]:
            try:
                answer = json.loads(ends[rank].recv_bytes())
            except EOFError:
                raise RuntimeError(f"rank {rank} died without a word") from None
            if "error" in answer:
                raise RuntimeError(f"rank {rank} failed:\n{answer['error']}")
            answers[rank] = answer["value"]
    return [answers[rank] for rank in range(len(ends))]


def _rank(body: Body, rank: int, options: dict[str, Any], store_file: str, answer: Connection) -> None:
    import torch
    import torch.distributed

    dist: Any = torch.distributed
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(store_file, WORLD)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=WORLD, timeout=datetime.timedelta(seconds=TIMEOUT_S)
        )
        value = body(rank, dist.group.WORLD, options)
        dist.barrier()
        answer.send_bytes(json.dumps({"value": value}).encode())
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 - the parent must hear of whatever ended this rank
        answer.send_bytes(json.dumps({"error": traceback.format_exc()}).encode())
    finally:
        answer.close()
