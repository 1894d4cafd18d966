"""`python -m tpctl.drill.host`: one host of a drill over two, in the network namespace that it was started in.

Its standard input brings the launch, one JSON object on the first line, and then `cut` and `heal`; the end of the input
ends the launch. Its standard output has one JSON object a line: `{"born": true}` at once, `{"ready": true}` when the
link is up, and at the end `{"outcome": {...}}`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from tpctl.launch.local import LaunchSpec, run

LINK = "tpctl0"


class Deserted(Exception):
    """Nobody holds the other end of our input any more."""


class Link:
    """This host's end of the link."""

    def __init__(self, address: str) -> None:
        _ip("link", "set", "lo", "up")
        _ip("address", "add", f"{address}/24", "dev", LINK)
        self.heal()

    def cut(self) -> None:
        _ip("link", "set", LINK, "down")

    def heal(self) -> None:
        _ip("link", "set", LINK, "up")


def main() -> int:
    print(json.dumps({"born": True}), flush=True)
    wanted: dict[str, Any] = json.loads(sys.stdin.readline())
    link = Link(wanted["address"])
    deserted = threading.Event()

    def listen() -> None:
        for line in sys.stdin:
            {"cut": link.cut, "heal": link.heal}[line.strip()]()
            print(json.dumps({"done": line.strip()}), flush=True)
        deserted.set()

    def tick(_: float) -> None:
        if deserted.is_set():
            raise Deserted

    os.environ["GLOO_SOCKET_IFNAME"] = LINK
    os.environ["NCCL_SOCKET_IFNAME"] = LINK
    print(json.dumps({"ready": True}), flush=True)
    threading.Thread(target=listen, daemon=True).start()
    spec = LaunchSpec(
        nproc=wanted["nproc"],
        run_dir=Path(wanted["run_dir"]),
        ranks_dir=Path(wanted["ranks_dir"]),
        arguments=["--config", wanted["config"], "--run-dir", wanted["ranks_dir"]],
        deadline_s=wanted["deadline_s"],
        nnodes=2,
        node_rank=wanted["node_rank"],
        rdzv_endpoint=wanted["rdzv_endpoint"],
        rdzv_id=wanted["rdzv_id"],
        local_addr=wanted["address"],
        referee=wanted["referee"],
    )
    outcome = run(spec, tick)
    print(json.dumps({"outcome": dataclasses.asdict(outcome)}), flush=True)
    return 0


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, stdin=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
