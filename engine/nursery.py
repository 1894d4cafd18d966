"""A nursery of ranks: one process that has imported everything forks each rank, so that a rank starts at once.

For drills, whose subject is how a job ends, not how it starts. One JSON object a line. On stdin, what to fork:
`{"rank", "argv", "environ", "stderr"}`; the rank `"referee"` is the host's referee. On stdout `{"event": "ready"}`,
then for each rank `{"event": "started", "rank", "pid"}` and `{"event": "ended", "rank", "pid", "code", "t_ns"}`
(monotonic; a signal reads negative, as with `subprocess`). When stdin ends, every rank that is left is killed.
"""

from __future__ import annotations

import gc
import json
import os
import selectors
import signal
import sys
import time
import traceback
from typing import Any, NoReturn

REFEREE = "referee"


def main() -> int:
    """Serve until stdin ends."""
    _preload()
    _say({"event": "ready"})
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    ranks: dict[int, dict[str, Any]] = {}  # by pidfd
    pending = b""
    while True:
        for key, _ in selector.select():
            if key.fd in ranks:
                ended = ranks.pop(key.fd)
                selector.unregister(key.fd)
                os.close(key.fd)
                t_ns = time.monotonic_ns()
                code = os.waitstatus_to_exitcode(os.waitpid(ended["pid"], 0)[1])
                _say({"event": "ended", **ended, "code": code, "t_ns": t_ns})
                continue
            read = os.read(0, 1 << 16)
            if not read:
                for rank in ranks.values():
                    os.kill(rank["pid"], signal.SIGKILL)
                return 0
            *lines, pending = (pending + read).split(b"\n")
            for line in lines:
                wanted = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    _become_rank(wanted)
                pidfd = os.pidfd_open(pid)
                ranks[pidfd] = {"rank": wanted["rank"], "pid": pid}
                selector.register(pidfd, selectors.EVENT_READ)
                _say({"event": "started", **ranks[pidfd]})


def _become_rank(wanted: dict[str, Any]) -> NoReturn:
    """In the child: a session, environment, log and working files of its own, then the worker's entry."""
    code = 1
    try:
        os.setsid()
        log = os.open(wanted["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.dup2(log, 2)
        os.closerange(3, 256)  # the nursery's selector and the pidfds of other ranks
        os.environ.clear()
        os.environ.update(wanted["environ"])
        if wanted["rank"] == REFEREE:
            from engine.referee.__main__ import main as work
        else:
            from engine.worker import main as work
        code = work(wanted["argv"])
    except BaseException:  # noqa: BLE001 - the process ends here; its log must say why
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _preload() -> None:
    """Whatever any rank imports, from disk once. No thread may run when ranks are forked: none is started here."""
    from diffusers import AutoencoderKLWan
    from transformers import AutoTokenizer, UMT5EncoderModel

    from engine import leader, materials, pipeline, worker
    from engine.codecs import text, vae
    from engine.referee import __main__ as referee
    from engine.sinks import raw

    assert all(
        (
            AutoencoderKLWan,
            AutoTokenizer,
            UMT5EncoderModel,
            leader,
            materials,
            referee,
            pipeline,
            worker,
            text,
            vae,
            raw,
        )
    )
    gc.collect()
    gc.freeze()  # the collector would otherwise touch, and so copy, every page in every rank


def _say(event: dict[str, Any]) -> None:
    os.write(1, json.dumps(event).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main())
