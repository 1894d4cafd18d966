"""Order between the thread that computes and the thread that talks, on a device that runs behind both.

On CUDA the comms thread works on a stream of its own. An event orders the producer before it, another orders it before
the consumer, and `record_stream` keeps memory from being used anew while the other stream still reads it. On the CPU
there is nothing to order, and all of this does nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch

_cuda: Any = torch.cuda  # its classes carry no types


class CommStream:
    """The stream of one comms thread, and both edges of it.

    Args:
        device: `cpu`, `cuda` or `cuda:n`.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self._stream: Any = _cuda.Stream(self.device) if self.device.type == "cuda" else None

    def mark(self) -> Any:
        """On the thread that made something: an event after all that was queued so far; None without a device."""
        if self._stream is None:
            return None
        event = _cuda.Event()
        event.record(_cuda.current_stream(self.device))
        return event

    def to_host(self, tensors: dict[str, torch.Tensor | None], made: Any) -> dict[str, torch.Tensor | None]:
        """On the comms thread: copies in pinned memory, complete when this returns. `made` is the producer's mark."""
        if self._stream is None:
            return tensors
        with _cuda.stream(self._stream):
            self._stream.wait_event(made)
            copies = {name: self._copy_out(tensor) for name, tensor in tensors.items()}
        self._stream.synchronize()  # the bytes are read by the CPU next
        return copies

    def to_device(self, host: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """On the comms thread: the tensor on the device, and the mark to wait for before it is read there."""
        if self._stream is None:
            return host, None
        with _cuda.stream(self._stream):
            tensor = host.to(self.device, non_blocking=True)
            event = _cuda.Event()
            event.record(self._stream)
        # The copy reads `host` until then, which the caching allocator of pinned memory knows of by itself.
        return tensor, event

    def receive(self, tensors: Iterable[torch.Tensor], made: Any) -> None:
        """On the consumer's thread: what it queues from here on runs after `made`."""
        if made is None:
            return
        current = _cuda.current_stream(self.device)
        current.wait_event(made)
        for tensor in tensors:
            tensor.record_stream(current)

    def _copy_out(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None or tensor.device.type == "cpu":
            return tensor
        with contextlib.suppress(RuntimeError):  # a view into memory that no allocator of torch's owns needs none
            tensor.record_stream(self._stream)
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return copy.copy_(tensor, non_blocking=True)
