"""What the start-up parity check costs at 8, 64 and 512 ranks, against gathering everything from everybody.

A rank is a thread that runs the engine's real `parity.check` on a real launch observation, over torch's collectives
and a backend that counts. Ranks that hold the same values send the same bytes, so three threads can stand for all:
the leader, one of the many, and the odd one; the backend hands their tensors out as often as there are ranks. (With
`everybody`, each rank is a thread; the tests compare the two.) The rival is what one would write first:
`all_gather_object` of the whole observation. Calls and bytes are exact and the same on every machine: what a rank hands
over and what it takes from others (a sum counted as a ring does it: twice each way), whatever an algorithm makes of
that on a wire. Times are the CPU time of one rank.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.measure import Pairs, Row, order

if TYPE_CHECKING:
    from engine.comm.group import Group

SIZES = (8, 64, 512)
DEADLINE_S = 60.0
RIVAL = "all_gather_object of the whole observation"
# What differs in the observation of the odd rank, which is the last one.
CASES: dict[str, Callable[[dict[str, str]], dict[str, str]]] = {
    "all equal": lambda seen: seen,
    "one value differs on one rank": lambda seen: seen | {"environment.OMP_NUM_THREADS": "7"},
    "every value differs on one rank": lambda seen: {key: f"{value}!" for key, value in seen.items()},
}
Body = Callable[["Group", Mapping[str, str]], None]


@dataclass
class Traffic:
    """Collective calls of one rank, bytes it handed over, bytes it took from others."""

    calls: int = 0
    sent: int = 0
    received: int = 0
    ops: list[str] = field(default_factory=list)

    def add(self, op: str, sent: int, received: int) -> None:
        self.calls += 1
        self.sent += sent
        self.received += received
        self.ops.append(op)


@dataclass(frozen=True)
class Measured:
    """`traffic` and `errors` by rank, of the last turn; `times_s` is the CPU time of rank 1 in each turn."""

    traffic: dict[int, Traffic]
    errors: dict[int, Exception]
    times_s: list[float]


def run(quick: bool) -> list[Row]:
    rows = []
    for size in SIZES:
        for case, change in CASES.items():
            found = simulate(size, change, {"ours": ours, "rival": rival}, turns=3 if quick else 20)
            rows.append(_bytes_row(f"parity check, {size} ranks, {case}", found))
            if case != "every value differs on one rank":
                rows.append(_time_row(f"parity check, {size} ranks, {case}: CPU time of a rank", found))
    return rows


def ours(group: Group, observation: Mapping[str, str]) -> None:
    from engine.comm import parity

    parity.check(group, observation, "the benchmark's values")


def rival(group: Group, observation: Mapping[str, str]) -> None:
    """Gather, compare; the values by rank are then at hand everywhere, whether anything differs or not."""
    import torch.distributed as dist

    everything: list[Any] = [None] * group.size
    dist.all_gather_object(everything, dict(observation), group=group._pg)
    if any(one != everything[0] for one in everything):
        raise ValueError("ranks differ")


def observation() -> dict[str, str]:
    from engine.comm import parity
    from engine.config import EngineConfig

    return parity.launch_observation(EngineConfig())


def simulate(
    size: int,
    change: Callable[[dict[str, str]], dict[str, str]],
    bodies: Mapping[str, Body],
    turns: int = 1,
    everybody: bool = False,
    odd: int | None = None,
    base: Mapping[str, str] | None = None,
) -> dict[str, Measured]:
    """Run each body on `size` ranks, three at least, in turns.

    The observation of rank `odd` is changed: 0, or the last one, which is also the default. `base` is that of the
    others, by default a real one.

    Raises:
        RuntimeError: a rank broke, or did not end within the deadline.
    """
    ranks = list(range(size)) if everybody else [0, 1, size - 1]
    odd = size - 1 if odd is None else odd
    base = observation() if base is None else base
    traffic = {name: dict.fromkeys(ranks, Traffic()) for name in bodies}
    errors: dict[str, dict[int, Exception]] = {name: {} for name in bodies}
    times: dict[str, list[float]] = {name: [] for name in bodies}
    broken: list[Exception] = []
    table = Table(size, ranks)

    def rank_main(rank: int) -> None:
        import torch.distributed as dist

        from engine.comm.group import Group, Rank
        from engine.errors import ParityError

        HERE.table, HERE.rank = table, rank
        try:
            dist.init_process_group("counted", rank=rank, world_size=size, store=dist.HashStore())
            seen = change(dict(base)) if rank == odd else dict(base)
            group = Group("world_pg", tuple(map(Rank, range(size))), Rank(rank), dist.group.WORLD)
            for turn in range(turns + 1):  # the first one warms up
                for name in order(list(bodies), turn):
                    HERE.traffic = traffic[name][rank] = Traffic()
                    started = time.thread_time()
                    try:
                        bodies[name](group, seen)
                    except (ValueError, ParityError) as error:
                        errors[name][rank] = error
                    if rank == 1 and turn:
                        times[name].append(time.thread_time() - started)
        except Exception as error:  # noqa: BLE001 - handed to the caller; the other ranks are let go
            broken.append(error)
            table.barrier.abort()

    with counted_backend():
        threads = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
    late = sum(thread.is_alive() for thread in threads)
    if broken or late:
        raise RuntimeError(repr(broken[0]) if broken else f"{late} of {len(ranks)} ranks did not end")
    return {name: Measured(traffic[name], errors[name], times[name]) for name in bodies}


class Table:
    """Where the ranks of one world lay down what they send, and find what the others sent."""

    def __init__(self, size: int, ranks: list[int]) -> None:
        self.barrier = threading.Barrier(len(ranks), timeout=DEADLINE_S)
        self._owner = [rank if rank in ranks else 1 for rank in range(size)]
        self._laid: dict[int, Any] = {}

    def exchange(self, rank: int, sent: Any, take: Callable[[list[Any]], None]) -> None:
        self._laid[rank] = sent
        self.barrier.wait()
        take([self._laid[owner] for owner in self._owner])
        self.barrier.wait()

    def total(self, rank: int, sent: Any) -> Any:
        """The sum. Of the many ranks that one thread stands for, the thread itself is the only one with anything to
        add: in `parity.check` ranks that agree with most add nothing, but for the first of them."""
        self._laid[rank] = sent
        self.barrier.wait()
        found = sum(self._laid.values())
        self.barrier.wait()
        return found


class _Here(threading.local):
    """Of one rank's thread."""

    table: Table
    rank: int
    traffic: Traffic


HERE = _Here()


@contextmanager
def counted_backend() -> Iterator[None]:
    """A torch backend named "counted" whose ranks are threads of this process."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed import multi_threaded_pg as threaded

    class Counted(dist.ProcessGroup):
        def __init__(self, rank: int, size: int) -> None:
            super().__init__(rank, size)
            self.places, self.place = size, rank

        def allgather(self, outputs: Any, inputs: Any, *_: Any) -> Any:
            def take(laid: list[Any]) -> None:
                for target, source in zip(outputs[0], laid, strict=True):
                    target.copy_(source)

            HERE.table.exchange(self.place, inputs[0], take)
            HERE.traffic.add("all_gather", inputs[0].nbytes, inputs[0].nbytes * (self.places - 1))
            return threaded.ret_work(outputs)

        def allreduce(self, tensors: Any, *_: Any) -> Any:
            total = HERE.table.total(self.place, tensors[0])
            tensors[0].copy_(total)
            HERE.traffic.add("all_reduce", 2 * tensors[0].nbytes, 2 * tensors[0].nbytes)  # as a ring does it
            return threaded.ret_work(tensors)

        def size(self) -> int:
            return self.places

        def getBackendName(self) -> str:
            return "counted"

    dist.Backend.register_backend("counted", lambda store, rank, size, timeout: Counted(rank, size), devices=["cpu"])
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    threaded._install_threaded_pg()
    try:
        yield
    finally:
        threaded._uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
        del dist.Backend.backend_list[dist.Backend.backend_list.index("counted")]


def _most(found: Measured) -> Traffic:
    return max(found.traffic.values(), key=lambda one: one.received + one.sent)


def _bytes_row(name: str, found: Mapping[str, Measured]) -> Row:
    own, other = _most(found["ours"]), _most(found["rival"])
    moved, gathered = own.sent + own.received, other.sent + other.received
    return Row(
        name=name,
        ours=moved / 1e3,
        rival_name=RIVAL,
        rival=gathered / 1e3,
        unit="kB",
        ratio=moved / gathered,
        target=1.0 if "differs" in name else 0.1,
        note=f"of the busiest rank; {own.calls} collectives against {other.calls}",
    )


def _time_row(name: str, found: Mapping[str, Measured]) -> Row:
    pairs = Pairs({key: one.times_s for key, one in found.items()})
    ratios = pairs.ratios("ours", "rival")
    return Row(
        name=name,
        ours=pairs.median("ours") * 1e3,
        rival_name=RIVAL,
        rival=pairs.median("rival") * 1e3,
        unit="ms",
        ratio=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        target=1.0 if "equal" in name else None,  # a difference ends the job: then only its bytes matter
        samples=len(ratios),
    )
