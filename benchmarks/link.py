"""What one chunk costs on the pp link, both ways, against one raw send and receive of the same bytes on the same group.

Ours is all of it, as Stage 0 and the leader do it: `prepare`, header, meta and payload sent, every check of the leader,
the digest of the result, the answer prepared and sent, every check of Stage 0, and its digest. With inputs, the leader
also takes the digest of all tensors that phase B begins with, which is the mesh's tripwire and not the link's.
Raw moves the same payloads down and up between buffers that know nothing: it is the limit. Bare announces each payload
by a message of its own first, as any protocol must whose receiver judges before it makes room, and checks nothing.
All are timed on rank 0, from its start until it has the answer, one chunk at a time: nothing hides behind anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.measure import Pairs, Row, order
from benchmarks.pair import run_pair

if TYPE_CHECKING:
    import torch

    from engine.wire.envelope import Shapes

FRAMES = 3
STEPS = (1000, 750, 500, 250)
RIVALS = ("ours", "inputs", "bare", "raw")
# Channels, latent height and width; text length and width; dtype.
SIZES: dict[str, tuple[tuple[int, int, int], tuple[int, int], str]] = {
    "320x576": ((16, 40, 72), (512, 4096), "bfloat16"),
    "bring-up, 64x96": ((16, 8, 12), (32, 32), "float32"),
}
TARGET = 1.2


def run(quick: bool) -> list[Row]:
    rows = []
    for name, (latent, text, dtype) in SIZES.items():
        options = {"latent": latent, "text": text, "dtype": dtype, "turns": 40 if quick else 300, "warm_up": 20}
        answer = run_pair(_measure, options, deadline_s=240)
        down, up = answer["bytes"]
        note = f"{down / 1e6:.2f} MB down, {up / 1e6:.2f} MB up"
        pairs = Pairs(answer["times"])
        rival = "one raw send and receive each way"
        rows += [
            pairs.row(f"pp link, a chunk of {name}", "ours", "raw", rival_name=rival, target=TARGET, note=note),
            pairs.row(f"with the input digest, {name}", "inputs", "raw", rival_name=rival),
            pairs.row(f"announced and unchecked, {name}", "bare", "raw", rival_name=rival),
        ]
    return rows


def _measure(rank: int, pg: Any, options: dict[str, Any]) -> dict[str, Any]:
    import torch

    from engine.comm.group import Phase, PhaseGate, Rank
    from engine.comm.p2p import FIRST_BYTES, LeaderEnd, Stage0End
    from engine.comm.pair import Pair
    from engine.plan import PP0
    from engine.wire.envelope import Shapes
    from engine.wire.header import Limits

    shapes = Shapes(FRAMES, FRAMES, *options["latent"], *options["text"], options["dtype"])
    pair = Pair.of((Rank(0), Rank(1)), Rank(rank), pg, PhaseGate(Phase.LINK))
    end = (Stage0End, LeaderEnd)[rank](pair, Limits(), shapes, PP0)
    tensors = _tensors(shapes)
    latents_BFCHW = tensors["latents"]
    ours = _stage0(end, shapes, tensors) if rank == 0 else _leader(end, latents_BFCHW)
    inputs = ours if rank == 0 else _leader(end, latents_BFCHW, inputs=True)
    ours(0)  # without context; every later chunk is of full size
    bytes_down, bytes_up = ours(1)
    sizes = bytes_down, bytes_up
    calls = {
        "ours": ours,
        "inputs": inputs,
        "bare": _raw(rank, pg, (FIRST_BYTES, bytes_down), (FIRST_BYTES, bytes_up)),
        "raw": _raw(rank, pg, (bytes_down,), (bytes_up,)),
    }
    times: dict[str, list[float]] = {name: [] for name in RIVALS}
    chunk = 1
    for turn in range(options["warm_up"] + options["turns"]):
        for name in order(RIVALS, turn):
            chunk += name in ("ours", "inputs")
            torch.distributed.barrier(group=pg)
            started = time.perf_counter()
            calls[name](chunk)
            if turn >= options["warm_up"]:
                times[name].append(time.perf_counter() - started)
    return {"times": times, "bytes": sizes}


def _tensors(shapes: Shapes) -> dict[str, torch.Tensor]:
    """Those of an envelope in the middle of a stream, by in-memory name."""
    import torch

    from engine.plan import PP0

    generator = torch.Generator().manual_seed(0)
    wanted = shapes.expected(PP0, num_steps=len(STEPS), do_kv_recompute=True, current_start_frame=FRAMES)
    made = {
        name: torch.randn(shape_dtype[0], generator=generator).to(getattr(torch, shape_dtype[1]))
        for name, shape_dtype in wanted.items()
        if shape_dtype is not None
    }
    return made | {"denoising_step_list": torch.tensor(STEPS, dtype=torch.int64)}


def _stage0(end: Any, shapes: Shapes, tensors: dict[str, torch.Tensor]) -> Callable[[int], tuple[int, int]]:
    from benchmarks.chunkplan import chunk_plan
    from engine import tripwires
    from engine.plan import PP0
    from engine.wire.envelope import Envelope

    def chunk_round(chunk: int) -> tuple[int, int]:
        held = tensors if chunk else tensors | {"context_frames": None}
        room = end.expect()
        frame = end.prepare(Envelope(PP0, chunk_plan(chunk, shapes, STEPS), None, held))
        end.post(frame)
        room.wait()
        result = end.read(room)
        end.settle(result.call_id)
        latents_BFCHW = result.latents_out_BFCHW
        digest = tripwires.digest({"latents_out": latents_BFCHW})
        if (result.chunk_index, result.output_digest_i64) != (chunk, digest):
            raise RuntimeError(f"expected the result of chunk {chunk}, got that of {result.chunk_index}")
        return frame.header.payload_bytes, latents_BFCHW.nbytes

    return chunk_round


def _leader(end: Any, latents_BFCHW: torch.Tensor, inputs: bool = False) -> Callable[[int], tuple[int, int]]:
    from engine import tripwires
    from engine.wire.result import Result

    def chunk_round(chunk: int) -> tuple[int, int]:
        received = end.receive()
        envelope, plan = received.envelope, received.envelope.plan
        if plan.chunk_index != chunk:
            raise RuntimeError(f"expected chunk {chunk}, received {received.header}")
        if inputs:
            tripwires.digest(envelope.tensors, (plan,))
        result = Result(
            call_id=received.header.call_id,
            chunk_index=chunk,
            cache_epoch=plan.cache_epoch,
            control_epoch=plan.control_epoch,
            ok=True,
            error_code=None,
            error_message=None,
            observed_generator_calls=plan.expected_calls,
            mesh_current_start_frame=plan.current_start_frame + FRAMES,
            output_digest_i64=tripwires.digest({"latents_out": latents_BFCHW}),
            t_b_ms=0.0,
            t_mesh_idle_ms=0.0,
            latents_out_BFCHW=latents_BFCHW,
        )
        end.answer(result)
        return received.header.payload_bytes, latents_BFCHW.nbytes

    return chunk_round


def _raw(rank: int, pg: Any, down: tuple[int, ...], up: tuple[int, ...]) -> Callable[[int], None]:
    """Messages of these sizes in bytes, down and then up, each waited for before the next."""
    import torch

    rooms = [[torch.zeros(nbytes, dtype=torch.uint8) for nbytes in sizes] for sizes in (down, up)]

    def there_and_back(_: int) -> None:
        for sender, messages in enumerate(rooms):
            for message in messages:
                (pg.send if rank == sender else pg.recv)([message], 1 - rank, 0).wait()

    return there_and_back
