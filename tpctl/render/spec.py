"""What is to be rendered, checked: equal input gives equal text, whoever renders it and where."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from engine.config import EngineConfig
from tpctl import snapshot
from tpctl.errors import RenderError
from tpctl.jobs.ending import ABORT_S
from tpctl.jobs.hosts import check_shares

# A DNS label that leaves room for what a cluster appends to it.
NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Between the end of a drain that had to abort and the end of the supervisor.
MARGIN_S = 10


@dataclass(frozen=True)
class Spec:
    """One job on a cluster. `command` is `tpctl` as the nodes know it; `grace_s` is what an ending may take."""

    name: str
    nodes: int
    config: EngineConfig
    command: str = "tpctl"
    port: int = 29400
    grace_s: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        name: str,
        nodes: int,
        config: EngineConfig,
        command: str,
        port: int,
        grace_s: int | None,
        variables: Sequence[str],
    ) -> Spec:
        """Raises RenderError, or HostsError for ranks that the nodes cannot share equally."""
        if not NAME.fullmatch(name):
            raise RenderError(
                f"a name on a cluster is a DNS label: 1 to 40 lower-case letters, digits and dashes, a letter first "
                f"and no dash last; got {name!r}",
                code="TP-8061",
                next_step="--name preview",
            )
        check_shares(nodes, config.world_size)
        deadline_s = config.liveness.drain_deadline_s
        least_s = math.ceil(deadline_s + ABORT_S) + MARGIN_S
        if grace_s is not None and grace_s < least_s:
            raise RenderError(
                f"--grace is {grace_s} s, and a drain of {deadline_s:g} s with the abort after it may take {least_s} s",
                code="TP-8062",
                next_step=f"--grace {least_s}, or --set liveness.drain_deadline_s=...",
            )
        if not command.strip() or "\n" in command:
            raise RenderError("--command must name the tpctl of the nodes", code="TP-8065", next_step="--command tpctl")
        return cls(name, nodes, config, command, port, grace_s or least_s, environment(variables))

    @property
    def ranks_per_node(self) -> int:
        return self.config.world_size // self.nodes

    @property
    def gpus_per_node(self) -> int:
        """One a rank, unless the configuration says that ranks compute on the CPU."""
        return 0 if self.config.model.device == "cpu" else self.ranks_per_node

    def toml(self, **changes: str) -> str:
        """The configuration, every value of it."""
        import tomli_w

        return tomli_w.dumps(self.config.replace(**changes).to_dict() if changes else self.config.to_dict())


def environment(variables: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE pairs, of the variables that `tpctl env` shows: nothing private gets into a file by accident.

    Raises:
        RenderError: malformed, or not on the list.
    """
    found = {}
    for pair in variables:
        name, equals, value = pair.partition("=")
        if not equals or not VARIABLE.fullmatch(name) or "\n" in value or "\0" in value:
            raise RenderError(f"--env needs NAME=VALUE on one line, got {pair!r}", code="TP-8063")
        if name not in snapshot.VARIABLES and not name.startswith(snapshot.PREFIXES):
            raise RenderError(
                f"--env: '{name}' is not on the list of variables that ranks are started with",
                code="TP-8064",
                next_step="the configuration's key for what it sets, or the cluster's own secrets",
            )
        found[name] = value
    return dict(sorted(found.items()))
