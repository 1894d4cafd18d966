"""What an operator says to a running job: a unix socket of rank 0, and the requests that wait for their chunk.

One request a line, one answer a line, both JSON of this version:
    {"v": 1, "id": "...", "op": "steer", "prompt": "...", "cut": true, "bias": 0.5, "recompute": false, "paused": true}
    {"v": 1, "id": "...", "op": "receipt"}                        # what became of the request of that id
    {"v": 1, "id": "...", "op": "take-back"}                      # of a drain: the stream goes on, if it still can
    {"v": 1, "id": "...", "op": "metrics"}                        # answered with their text
    {"v": 1, "id": "...", "ok": true, "state": "received" | "held" | "applied" | "shown", "chunk_index": 7}
    {"v": 1, "id": "...", "ok": false, "code": "TP-6503", "message": "..."}

A request never touches a process group: it waits until Stage 0 makes its next chunk. A repeated id is answered with
what became of the first, and does nothing. A stream is paused before a chunk, which then waits: `held`.
"""

from engine.control.request import MAX_LINE_BYTES, VERSION, ControlError
from engine.control.server import MAX_CLIENTS, ControlSocket, peer_uid
from engine.control.steering import MAX_WAITING, NOT_ASKED, REMEMBERED, SteeredTimeline, Steering

__all__ = [
    "MAX_CLIENTS",
    "MAX_LINE_BYTES",
    "MAX_WAITING",
    "NOT_ASKED",
    "REMEMBERED",
    "VERSION",
    "ControlError",
    "ControlSocket",
    "SteeredTimeline",
    "Steering",
    "peer_uid",
]
