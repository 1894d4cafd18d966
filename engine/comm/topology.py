"""Which rank plays which part, and the only place that creates process groups.

Every rank creates every group, in the same order, at start-up. Before that, ranks meet at the launcher's store, where
a rank that never comes is named after a short deadline instead of stranding the others inside the backend.
"""

from __future__ import annotations

import datetime
import os
import time
import uuid
from dataclasses import dataclass
from typing import Any

from engine.blackbox import BlackBox
from engine.comm.group import Group, PhaseGate, Rank, dist
from engine.comm.neighbours import Neighbours, introduction
from engine.comm.pair import Pair
from engine.config import EngineConfig, RankEnv
from engine.errors import CommError, ConfigError, JoinError
from engine.plan import PP_PLANS, TP_PLANS, V0


@dataclass(frozen=True)
class Topology:
    """The placement of a plan's parts. `mesh` and `pp` hold global ranks; `pp` is empty where rank 0 is in the mesh."""

    tp_plan: str
    world_size: int
    mesh: tuple[Rank, ...]
    pp: tuple[Rank, ...] = ()

    @classmethod
    def of(cls, config: EngineConfig) -> Topology:
        """Every plan of `TP_PLANS` puts all ranks into the mesh, rank 0 leading; in pp, rank 0 stands before it."""
        plan = config.plan
        if plan.tp_plan in PP_PLANS:
            mesh = tuple(Rank(r) for r in range(1, 1 + plan.tp))
            return cls(plan.tp_plan, 1 + plan.tp, mesh, (Rank(0), mesh[0]))
        if plan.tp_plan not in TP_PLANS:
            raise ConfigError(f"no topology for plan '{plan.tp_plan}'", code="TP-1007")
        return cls(plan.tp_plan, plan.tp, tuple(Rank(r) for r in range(plan.tp)))

    def require_world(self, env: RankEnv) -> None:
        """Raise ConfigError if the launcher started another number of ranks than the plan needs."""
        if env.world_size != self.world_size:
            raise ConfigError(
                f"plan {self.tp_plan} needs {self.world_size} ranks, the launcher started {env.world_size}",
                code="TP-1012",
                fm="FM-01",
                next_step="start as many ranks as plan.tp says, or let `tpctl` start them",
            )

    def mesh_rank(self, rank: int) -> int:
        """-1 outside the mesh."""
        return self.mesh.index(Rank(rank)) if Rank(rank) in self.mesh else -1

    def role(self, rank: int) -> str:
        """`full` (v0), `stage0+stage1` (rank 0) or `stage1` (the other ranks of v1.1); in pp `stage0`, then `stage1`,
        the first of which leads."""
        if self.tp_plan == V0:
            return "full"
        if self.pp:
            return "stage0" if rank == 0 else "stage1+leader" if Rank(rank) == self.mesh[0] else "stage1"
        return "stage0+stage1" if rank == 0 else "stage1"

    def named(self, rank: int) -> str:
        """A rank in a sentence; in pp, where ranks are no peers of each other, with its role."""
        return f"rank {rank} ({self.role(rank)})" if self.pp else f"rank {rank}"


@dataclass
class Groups:
    """The process groups of one rank, sharing one phase gate."""

    world: Group
    mesh: Group
    gate: PhaseGate
    pp: Pair | None = None


class MeetingPoint:
    """The launcher's key-value store, used to wait for ranks by name and to say who is missing."""

    def __init__(self, env: RankEnv, topology: Topology, timeout_s: float) -> None:
        torch_dist = dist()
        # Under torchrun the agent serves the store; ranks started by hand let rank 0 serve it.
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._env = env
        self._topology = topology
        timeout = datetime.timedelta(seconds=timeout_s)
        try:
            store: Any = torch_dist.TCPStore(
                env.master_addr,
                env.master_port,
                env.world_size,
                is_master=env.rank == 0 and not agent,
                timeout=timeout,
                wait_for_workers=False,
            )
        except (RuntimeError, torch_dist.DistError) as error:
            servant = topology.named(0)
            waits = not agent and env.rank != 0
            serves = f", which {servant} serves, and which did not come within {timeout_s:g} s" if waits else ""
            raise JoinError(
                f"rank {env.rank} cannot reach the store at {env.master_addr}:{env.master_port}{serves}: "
                f"{_first_line(error)}",
                code="TP-3202",
                evidence={"missing": [0], "place": "store", "timeout_s": timeout_s} if waits else {},
                next_step=(f"look whether {servant} was started; " if waits else "")
                + "check that the port is free and the host resolves; `tpctl env` shows the network",
            ) from error
        self.store: Any = torch_dist.PrefixStore(f"tpctl/{env.attempt}", store)

    def name_job(self) -> str:
        """A name that all ranks of this launch share, and no other launch has."""
        return str(self.store.compare_set("job", "", uuid.uuid4().hex).decode())

    def meet(self, place: str, timeout_s: float) -> None:
        """Wait until every rank is at `place`.

        Raises:
            JoinError: names the ranks that did not come within `timeout_s`.
        """
        torch_dist = dist()
        self.store.set(f"{place}/{self._env.rank}", introduction())
        deadline = time.monotonic() + timeout_s
        keys = {rank: f"{place}/{rank}" for rank in range(self._env.world_size)}
        try:
            for key in keys.values():
                left = max(0.001, deadline - time.monotonic())
                self.store.wait([key], datetime.timedelta(seconds=left))
        except (RuntimeError, torch_dist.DistError) as error:
            missing = [rank for rank, key in keys.items() if not self.store.check([key])]
            raise JoinError(
                f"{self._said(missing)} did not reach '{place}' within {timeout_s:g} s "
                f"(waited for by rank {self._env.rank}; {self._env.world_size - len(missing)} of "
                f"{self._env.world_size} came)",
                evidence={"missing": missing, "place": place, "timeout_s": timeout_s},
                next_step="look at the missing rank's stderr.log in the run directory",
            ) from error

    def neighbours(self, place: str) -> Neighbours:
        """The ranks of this host, once all have met at `place`."""
        ranks = range(self._env.world_size)
        return Neighbours.read(self._env.rank, {rank: self.store.get(f"{place}/{rank}") for rank in ranks})

    def _said(self, ranks: list[int]) -> str:
        named = [self._topology.named(rank) for rank in ranks]
        return ", ".join([named[0], *(name.removeprefix("rank ") for name in named[1:])])


def create_groups(
    env: RankEnv,
    config: EngineConfig,
    topology: Topology,
    meeting: MeetingPoint,
    blackbox: BlackBox | None = None,
) -> Groups:
    """Initialise the backend and create `world_pg`, then `pp_pg` where the plan has one, then `mesh_pg`, on every rank.

    Raises:
        CommError: the backend cannot start.
    """
    gate = PhaseGate(blackbox=blackbox)
    rank = Rank(env.rank)
    world = tuple(Rank(r) for r in range(env.world_size))
    if env.world_size == 1:
        return Groups(Group("world_pg", world, rank, None, gate), Group("mesh_pg", world, rank, None, gate), gate)
    timeout = datetime.timedelta(seconds=config.comm.dist_timeout_s)
    backend = effective_comm_backend(config)
    try:
        dist().init_process_group(
            backend, store=meeting.store, rank=env.rank, world_size=env.world_size, timeout=timeout
        )
        # Frames between two parties are read before a device may be touched, and NCCL orders both directions in one
        # line: so this group is always gloo, and CUDA tensors pass through pinned memory.
        pp_pg = dist().new_group(list(topology.pp), timeout=timeout, backend="gloo") if topology.pp else None
        mesh_pg = dist().new_group(list(topology.mesh), timeout=timeout, backend=backend)
    except (RuntimeError, ValueError) as error:
        raise CommError(
            f"rank {env.rank}: the backend '{backend}' did not start: {_first_line(error)}", code="TP-3002"
        ) from error
    return Groups(
        Group("world_pg", world, rank, dist().group.WORLD, gate),
        Group("mesh_pg", topology.mesh, rank, mesh_pg, gate),
        gate,
        Pair.of(topology.pp, rank, pp_pg, gate) if topology.pp else None,
    )


def effective_device(config: EngineConfig) -> str:
    """`auto` is cuda where there is one."""
    import torch

    if config.model.device != "auto":
        return config.model.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def effective_comm_backend(config: EngineConfig) -> str:
    """Headers and meta always travel on the CPU, so CUDA ranks get both backends."""
    if config.comm.backend == "gloo" or effective_device(config) == "cpu":
        return "gloo"
    return "cpu:gloo,cuda:nccl"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
