"""One frame of production size at tp=2 against one raw broadcast of the same bytes, and against the usual way.

Ours is all of a frame: prepare, header, meta and payload sent, every check of the receiver, the envelope rebuilt.
The raw broadcast moves the same payload bytes between two buffers and knows nothing: it is the limit.
The usual way is `broadcast_object_list` for the meta, then one broadcast a tensor.

Each measurement runs from the sender's start until the receiver has what it needs: a last tiny `all_reduce`, the same
for all rivals, says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.measure import Pairs, Row, order
from benchmarks.pair import run_pair

if TYPE_CHECKING:
    import torch

LATENT = (16, 40, 72)  # channels, height, width: 320 x 576 pixels
FRAMES = 3
STEPS = (1000, 750, 500, 250)
TEXT = (512, 4096)
DTYPE = "bfloat16"
RIVALS = ("ours", "raw", "usual")


def run(quick: bool) -> list[Row]:
    answer = run_pair(_measure, {"turns": 30 if quick else 150, "warm_up": 10}, deadline_s=240)
    pairs = Pairs(answer["times"])
    size = f"{answer['payload_bytes'] / 1e6:.1f} MB in {answer['messages']} messages"
    return [
        pairs.row("envelope, whole frame", "ours", "raw", rival_name="one raw dist.broadcast", target=1.25, note=size),
        pairs.row(
            "envelope, against the usual way",
            "ours",
            "usual",
            rival_name="broadcast_object_list + a broadcast a tensor",
            inverse=True,
            target=1.5,
        ),
        pairs.row(
            "the usual way itself",
            "usual",
            "raw",
            rival_name="one raw dist.broadcast",
            note="where the limit leaves it",
        ),
    ]


def _measure(rank: int, pg: Any, options: dict[str, Any]) -> dict[str, Any]:
    import torch

    from engine.comm.group import Group, Phase, PhaseGate, Rank
    from engine.comm.transport import BroadcastLink
    from engine.plan import V1
    from engine.wire.envelope import Shapes
    from engine.wire.header import Limits

    group = Group("mesh_pg", (Rank(0), Rank(1)), Rank(rank), pg, PhaseGate(Phase.LINK))
    channels, latent_h, latent_w = LATENT
    shapes = Shapes(FRAMES, FRAMES, channels, latent_h, latent_w, *TEXT, DTYPE)
    link = BroadcastLink(group, Limits(), shapes, V1)
    tensors = _tensors()
    ack = torch.zeros(1, dtype=torch.int64)
    ours = _ours(rank, link, tensors)
    # The first chunk has no context yet; the second is of full size, and so is every later one.
    ours(0)
    before = group.ledger.count
    payload_bytes = ours(1)
    messages = group.ledger.count - before
    calls = {"ours": ours, "raw": _raw(pg, payload_bytes), "usual": _usual(rank, pg, tensors)}
    times: dict[str, list[float]] = {name: [] for name in RIVALS}
    chunk = 1
    for turn in range(options["warm_up"] + options["turns"]):
        for name in order(RIVALS, turn):
            chunk += name == "ours"
            group.barrier()
            started = time.perf_counter()
            calls[name](chunk)
            torch.distributed.all_reduce(ack, group=pg)
            if turn >= options["warm_up"]:
                times[name].append(time.perf_counter() - started)
    return {"times": times, "payload_bytes": payload_bytes, "messages": messages}


def _tensors() -> dict[str, torch.Tensor]:
    """The tensors of a v1.1c envelope in the middle of a stream; [1,F,C,h,w], [n-1,1,F,C,h,w], [1,L,D], [n]."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(getattr(torch, DTYPE))

    return {
        "latents": draw(1, FRAMES, *LATENT),
        "renoise": draw(len(STEPS) - 1, 1, FRAMES, *LATENT),
        "conditioning_embeds": draw(1, *TEXT),
        "context_frames": draw(1, FRAMES, *LATENT),
        "denoising_step_list": torch.tensor(STEPS, dtype=torch.int64),
    }


def _ours(rank: int, link: Any, tensors: dict[str, torch.Tensor]) -> Callable[[int], int]:
    from benchmarks.chunkplan import chunk_plan
    from engine.plan import V1
    from engine.wire.envelope import Envelope
    from engine.wire.frame import prepare

    def send(chunk: int) -> int:
        held = tensors if chunk else tensors | {"context_frames": None}
        frame = prepare(
            Envelope(V1, chunk_plan(chunk, link.shapes, STEPS), None, held),
            call_id=link.next_call_id(),
            link=link.state,
            shapes=link.shapes,
            limits=link.limits,
            buffer=link.buffer,
        )
        link.send(frame)
        return int(frame.header.payload_bytes)

    def receive(chunk: int) -> int:
        received = link.receive()
        if received.envelope is None or received.header.chunk_index != chunk:
            raise RuntimeError(f"expected chunk {chunk}, received {received.header}")
        return int(received.header.payload_bytes)

    return send if rank == 0 else receive


def _raw(pg: Any, payload_bytes: int) -> Callable[[int], int]:
    import torch

    payload = torch.zeros(payload_bytes, dtype=torch.uint8)

    def broadcast(_: int) -> int:
        torch.distributed.broadcast(payload, src=0, group=pg)
        return payload_bytes

    return broadcast


def _usual(rank: int, pg: Any, tensors: dict[str, torch.Tensor]) -> Callable[[int], int]:
    """A pickled meta with shapes and dtypes; the receiver makes its tensors from it and receives them one by one."""
    import torch

    def broadcast(chunk: int) -> int:
        meta: list[Any] = [None]
        if rank == 0:
            meta = [{"chunk_index": chunk, "height": LATENT[1] * 8, "width": LATENT[2] * 8, "steps": STEPS}]
            meta[0]["tensors"] = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
        torch.distributed.broadcast_object_list(meta, src=0, group=pg)
        received = tensors if rank == 0 else {n: torch.empty(s, dtype=d) for n, s, d in meta[0]["tensors"]}
        for tensor in received.values():
            torch.distributed.broadcast(tensor, src=0, group=pg)
        return sum(tensor.nbytes for tensor in received.values())

    return broadcast
