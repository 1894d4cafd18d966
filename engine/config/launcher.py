"""What the launcher tells a rank about itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.errors import ConfigError


@dataclass(frozen=True)
class RankEnv:
    """What the launcher says about this process. `rank` is global."""

    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int
    attempt: int

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> RankEnv:
        try:
            return cls(
                rank=int(environ["RANK"]),
                world_size=int(environ["WORLD_SIZE"]),
                local_rank=int(environ.get("LOCAL_RANK", environ["RANK"])),
                master_addr=environ["MASTER_ADDR"],
                master_port=int(environ["MASTER_PORT"]),
                attempt=int(environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
            )
        except KeyError as error:
            raise ConfigError(
                f"{error.args[0]} is not set: a rank is started by torchrun, not by hand",
                code="TP-1002",
                next_step="tpctl bringup",
            ) from error
        except ValueError as error:
            raise ConfigError(f"the launcher's environment is malformed: {error}", code="TP-1002") from error
