"""How the blocks of the generator run: as they are written, or compiled, one graph for all of them.

A block is compiled whole, its collectives and its attention over the cache included; both are operators that a graph
holds without looking inside (`engine.comm.ingraph`, and `tpctl::attend_cached` here). All that changes from call to
call stays outside: where in the ring to write, what is live, the bias of age. So one graph serves every block, every
step and every chunk, and another is made only for another number of tokens: a recompute over K frames, if K is not F.

What is counted: graphs, as the backend is given them, and graph breaks with their reasons, as the compiler counts them.
After the warm-up both are known, and stay as they are.

Shape legend: B batch, L new tokens, H this rank's heads, d head width.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.comm import ingraph
from engine.comm.group import Group
from engine.errors import ConfigError
from engine.model.block import Block, Call, LayerCall

# Every rank must make the same kernels: where it changes bits, the compiler may not choose between two by timing them.
SAME_ON_ALL_RANKS = {"deterministic": True}
MOST_SHAPES = 64  # beyond the compiler's own limit it would go back to the interpreter, without a word
Run = Callable[[Block, Tensor, Tensor, LayerCall], Tensor]


class AsWritten:
    """No compiler."""

    graphs = 0

    @property
    def breaks(self) -> list[str]:
        return []

    @contextmanager
    def opened(self, call: Call, layers: int) -> Iterator[Sequence[Tensor | None]]:
        yield [None] * layers

    def __call__(self, block: Block, x_BLD: Tensor, e_F6D: Tensor, at: LayerCall) -> Tensor:
        y_BLD: Tensor = block(x_BLD, e_F6D, at)
        return y_BLD


class Compiled:
    """Blocks as graphs of `backend`: `inductor`, or, to look at the graphs alone, `aot_eager` or `eager`.

    Args:
        backend: a name that torch knows.
        mesh: the group of the blocks' collectives; it gets a handle.
        layers: how many blocks.
    """

    def __init__(self, backend: str, mesh: Group, layers: int) -> None:
        self.graphs = 0
        mesh.handle = mesh.handle or ingraph.register(mesh)
        self._call: Call | None = None
        self._make = torch._dynamo.lookup_backend(backend)
        self._options = {"config_patches": SAME_ON_ALL_RANKS} if backend == "inductor" else {}
        number = next(_count)
        _open[number] = self
        self._tickets = [torch.tensor((number, layer), device="cpu") for layer in range(layers)]
        self._breaks_before = _breaks()
        compile_: Any = torch.compile  # its types do not know of `recompile_limit`
        self._run: Run = compile_(_run, backend=self._compile, dynamic=False, recompile_limit=MOST_SHAPES)

    @property
    def breaks(self) -> list[str]:
        """Why a graph ended before its block did: one line a break."""
        before = self._breaks_before
        return [_told(why) for why, times in _breaks().items() for _ in range(times - before.get(why, 0))]

    @contextmanager
    def opened(self, call: Call, layers: int) -> Iterator[Sequence[Tensor | None]]:
        """While the body runs, the graphs' attention belongs to `call`."""
        self._call = call
        try:
            yield self._tickets
        finally:
            self._call = None

    def __call__(self, block: Block, x_BLD: Tensor, e_F6D: Tensor, at: LayerCall) -> Tensor:
        return self._run(block, x_BLD, e_F6D, at)

    def attend(self, layer: int, q_BLHd: Tensor, k_BLHd: Tensor, v_BLHd: Tensor) -> Tensor:
        assert self._call is not None, "a graph runs inside `opened`"
        return self._call.attend(layer, q_BLHd, k_BLHd, v_BLHd)

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.graphs += 1
        return self._make(graph, inputs, **self._options)


Blocks = AsWritten | Compiled


def blocks(compiler: str, mesh: Group, layers: int) -> Blocks:
    """For `model.compile`."""
    return AsWritten() if compiler == "off" else Compiled(compiler, mesh, layers)


def resolve_compiler(requested: str, device: str) -> str:
    """`requested`, once it has been seen to work here (seconds).

    Raises:
        ConfigError: it cannot compile on this host.
    """
    if requested == "off":
        return requested
    try:
        doubled = torch.compile(lambda x: torch.sin(x) + x, backend=requested)(torch.ones(64, device=device))
        failure = None if torch.isfinite(doubled).all() else "its first kernel computes nonsense"
    # The compiler's own errors derive from RuntimeError; a missing toolchain shows as one of the others.
    except (RuntimeError, ImportError, OSError, ValueError, LookupError, TypeError) as error:
        failure = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if failure is not None:
        raise ConfigError(
            f"model.compile '{requested}' cannot run on {device}: {failure}",
            code="TP-1032",
            evidence={"requested": requested, "device": device, "failure": failure},
            next_step="tpctl config check --set model.compile=off",
        )
    return requested


def keep_kernels_in(directory: Path) -> None:
    """Kernels are code that later runs load again: they belong where nobody else writes. An operator's own choice
    stands. And a rank makes them itself: helper processes would outlive one that leaves at once."""
    with contextlib.suppress(OSError):  # nowhere to keep anything: torch's own place will have to do
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(directory))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def _run(block: Block, x_BLD: Tensor, e_F6D: Tensor, at: LayerCall) -> Tensor:
    """What is compiled: any block, so that all share the graph."""
    return block(x_BLD, e_F6D, at)  # type: ignore[no-any-return]


def _told(reason: str) -> str:
    """The compiler's explanation, in a line; its hints and links are for its log."""
    lines = [line.strip() for line in reason.strip().splitlines() if line.strip()]
    why = next((line.removeprefix("Explanation: ") for line in lines if line.startswith("Explanation: ")), "")
    return re.sub(r" at 0x[0-9a-f]+", "", why or (lines[0] if lines else "no reason given"))


def _breaks() -> dict[str, int]:
    return dict(torch._dynamo.utils.counters["graph_break"])


_open: weakref.WeakValueDictionary[int, Compiled] = weakref.WeakValueDictionary()
_count = itertools.count()


def _attend_cached(q_BLHd: Tensor, k_BLHd: Tensor, v_BLHd: Tensor, ticket: Tensor) -> Tensor:
    number, layer = ticket.tolist()
    # A graph is promised rows that follow each other, as its fake below says.
    return _open[number].attend(layer, q_BLHd, k_BLHd, v_BLHd).contiguous()


ingraph.define(
    "attend_cached(Tensor q, Tensor k, Tensor v, Tensor ticket) -> Tensor",
    _attend_cached,
    lambda q, k, v, ticket: torch.empty_like(q, memory_format=torch.contiguous_format),
)
