"""The edges between Stage 0 and its comms thread on a CUDA device (contract, section 11), each against its absence.

A long kernel goes before what an edge orders, so that without the edge the other stream reads too early. Each test also
shows that it does: the same without the edge must go wrong, or the test proves nothing on this device.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from engine.streams import CommStream

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NUMEL = 8 << 20  # float32: 32 MiB, a block of its own in the allocator
LONG_CYCLES = 1_000_000_000  # about half a second; what the host does meanwhile takes microseconds
DEADLINE_S = 60.0


def on_the_comms_thread(call: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(call).result(DEADLINE_S)


def rest(device: str = "cuda") -> None:
    """Nothing runs, and no block of an earlier test waits for its next user."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()


def ones_are_everywhere(tensor: torch.Tensor) -> bool:
    torch.cuda.synchronize()
    return bool((tensor == 1).all())


@pytest.mark.parametrize("edge", [False, True], ids=["without", "with"])
def test_an_event_orders_the_producer_before_the_comms_thread(edge: bool) -> None:
    rest()
    comm = CommStream("cuda")
    made_by_stage0 = torch.zeros(NUMEL, device="cuda")
    # Pinned memory is cached: an allocation in the middle might wait for the device, and order what must not be.
    on_the_comms_thread(lambda: comm.to_host({"x": made_by_stage0}, comm.mark()))
    torch.cuda.synchronize()
    mark = comm.mark()  # of nothing: what it marks is over
    torch.cuda._sleep(LONG_CYCLES)
    made_by_stage0.fill_(1)
    if edge:
        mark = comm.mark()
    copies = on_the_comms_thread(lambda: comm.to_host({"x": made_by_stage0}, mark))
    # `to_host` has returned, so the bytes are there; nothing else is waited for.
    assert bool((copies["x"] == 1).all()) is edge
    assert copies["x"].is_pinned()


def arrive_late(comm: CommStream, host: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """A result whose copy to the device stands behind a long kernel of the comms stream."""

    def arrive() -> tuple[torch.Tensor, Any]:
        with torch.cuda.stream(comm._stream):
            zeros = torch.zeros(NUMEL, device="cuda")  # what the block holds until the copy has run
            comm._stream.synchronize()
            del zeros
            torch.cuda._sleep(LONG_CYCLES)
        return comm.to_device(host)

    arrived: tuple[torch.Tensor, Any] = on_the_comms_thread(arrive)
    return arrived


@pytest.mark.parametrize("edge", [False, True], ids=["without", "with"])
def test_another_event_orders_the_comms_thread_before_the_consumer(edge: bool) -> None:
    rest()
    comm = CommStream("cuda")
    host = torch.ones(NUMEL).pin_memory()
    seen = torch.zeros(NUMEL, device="cuda")
    torch.cuda.synchronize()
    result, made = arrive_late(comm, host)
    if edge:
        comm.receive([result], made)
    seen.copy_(result)  # queued by Stage 0 at once, on its own stream
    assert ones_are_everywhere(seen) is edge


@pytest.mark.parametrize("edge", [False, True], ids=["without", "with"])
def test_memory_that_the_consumer_still_reads_is_not_used_anew(edge: bool) -> None:
    """Stage 0 lets go of a result while its decode still waits to read it; the comms thread allocates the next."""
    rest()
    comm = CommStream("cuda")
    host = torch.ones(NUMEL).pin_memory()
    seen = torch.zeros(NUMEL, device="cuda")
    torch.cuda.synchronize()
    result, made = on_the_comms_thread(lambda: comm.to_device(host))
    if edge:
        comm.receive([result], made)
    else:
        torch.cuda.current_stream().wait_event(made)  # the order alone, without `record_stream`
    torch.cuda._sleep(LONG_CYCLES)
    seen.copy_(result)
    block = result.data_ptr()
    del result

    def next_result() -> torch.Tensor:
        with torch.cuda.stream(comm._stream):
            return torch.zeros(NUMEL, device="cuda")

    following = on_the_comms_thread(next_result)
    assert (following.data_ptr() != block) is edge
    assert ones_are_everywhere(seen) is edge
