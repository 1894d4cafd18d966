"""A job over several hosts: each runs `tpctl up` with the same name and configuration, and its share of the ranks.

Rank 0 is on the host with node rank 0, and so are the control socket and the drain; the others follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tpctl.errors import HostsError
from tpctl.jobs.record import JobRecord
from tpctl.launch.local import check_endpoint


@dataclass(frozen=True)
class Hosts:
    """`rdzv` is HOST:PORT of the host with node rank 0, where all meet; None on one host."""

    nnodes: int = 1
    node_rank: int = 0
    rdzv: str | None = None

    def check(self, name: str | None, world_size: int, restarts: bool) -> None:
        """Raises HostsError, or LaunchError for a malformed endpoint or a port that is in use."""
        if self.nnodes == 1:
            if self.node_rank or self.rdzv is not None:
                raise HostsError(
                    "--node-rank and --rdzv are for a job over several hosts, and --nnodes says 1",
                    next_step="tpctl up --nnodes 2 --node-rank 0 --rdzv HOST:29400 --name JOB",
                )
            return
        check_shares(self.nnodes, world_size)
        if self.node_rank >= self.nnodes:
            raise HostsError(
                f"--node-rank is {self.node_rank}, and of {self.nnodes} hosts the last is {self.nnodes - 1}",
                code="TP-8053",
                next_step=f"--node-rank 0 to {self.nnodes - 1}, another on each host",
            )
        if name is None or self.rdzv is None:
            missing = "--name" if name is None else "--rdzv"
            raise HostsError(
                f"{missing} is missing: hosts find each other by the job's name and by one HOST:PORT",
                next_step=f"tpctl up --nnodes {self.nnodes} --node-rank {self.node_rank} --rdzv HOST:29400 --name JOB",
            )
        if restarts:
            raise HostsError(
                "--restart on-failure is for one host: over several, hosts that start again at different times would "
                "not meet",
                code="TP-8054",
                next_step="leave the restart to the cluster: tpctl render kubernetes, or sbatch --requeue",
            )
        if self.rdzv.endswith(":0"):
            raise HostsError(
                "--rdzv needs a port that all hosts know, and 0 means any",
                code="TP-8055",
                next_step="--rdzv HOST:29400",
            )
        check_endpoint(self.rdzv, self.nnodes, self.node_rank)


def check_shares(nnodes: int, world_size: int) -> int:
    """Ranks of each host. Raises HostsError: they cannot be shared equally."""
    if nnodes > world_size:
        raise HostsError(
            f"{nnodes} hosts are more than the {world_size} rank(s) of this plan",
            code="TP-8051",
            evidence={"nodes": nnodes, "ranks": world_size},
            next_step="tpctl config show --set plan.tp=N",
        )
    if world_size % nnodes:
        raise HostsError(
            f"{world_size} ranks cannot be shared equally by {nnodes} hosts",
            code="TP-8052",
            evidence={"nodes": nnodes, "ranks": world_size},
            next_step="tpctl config show --set plan.tp=N",
        )
    return world_size // nnodes


def require_rank_zero(record: JobRecord) -> None:
    """Raises HostsError on a host whose ranks only follow."""
    if record.node_rank:
        where = (record.rdzv or "").rpartition(":")[0]
        raise HostsError(
            f"job '{record.name}' is led by rank 0, on the host with node rank 0; this is node rank {record.node_rank}",
            code="TP-8056",
            evidence={"rendezvous": where},
            next_step=f"the same command on {where}; here: tpctl status {record.name}",
        )


def drained_elsewhere(record: JobRecord, chunks: int, reports: Mapping[int, Mapping[str, Any]]) -> bool:
    """On a host that follows: did a stream of `chunks` (0: without an end), which ended well, end before its last one?
    Then the host of rank 0 was told to drain it."""
    made = [report["chunks"][-1]["chunk_index"] for report in reports.values() if report.get("chunks")]
    return record.node_rank > 0 and (chunks == 0 or max(made, default=-1) < chunks - 1)
