"""How far one rank's cache samples are from a replay's, head by head.

Shape legend: C generator calls, N layers, X keys and values (2), H heads, P sampled tokens, D sampled dims, W frames of
the window, M kinds of sums (3: plain, of magnitudes, signed), K measures (a sample, then the sums).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.sealed import SUMS
from tpctl.kvsamples import Samples

if TYPE_CHECKING:
    from tpctl.kvsamples import Array

# Relative to the mean magnitude of the head's cached values. Sums over the mesh round in another order than on one
# process: in float32 that reads 3e-6 to 5e-6 on healthy runs of the tiny model (2 and 4 ranks, with and without
# recompute), which is also what the engine is held to against its reference. The limit is twenty times that, and a
# hundredth of a drift of one percent. Half precision rounds every cached value to 2^-11 or 2^-8 of itself and layers
# add up: bfloat16 reads up to 7e-2, so that only coarse drifts show there, and fine ones need a run in float32.
TOLERANCE: Mapping[str, float] = {"float32": 1e-4, "float16": 5e-2, "bfloat16": 4e-1}
CACHES = ("text", "self")  # in the order in which a call fills them
NAMES = ("key", "value")
MEASURES = ("sample", *SUMS)


@dataclass(frozen=True)
class Deviation:
    """One head of one layer after one generator call (from 1), beyond the tolerance. `head` as the model counts."""

    chunk_index: int
    cache_epoch: int
    call_id: int
    call: int
    calls: int
    cache: str
    layer: int
    head: int
    rank: int
    tensor: str
    measure: str
    deviation: float

    @property
    def place(self) -> tuple[int, int, int, int]:
        """Where it stands in the order of computation: chunk, call, text before the layers, layer."""
        return self.chunk_index, self.call, CACHES.index(self.cache), self.layer if self.cache == "self" else 0

    def sentence(self) -> str:
        where = f"chunk {self.chunk_index}, generator call {self.call} of {self.calls}, layer {self.layer}"
        cache = "text cache" if self.cache == "text" else "cache"
        return (
            f"{where}, head {self.head}: rank {self.rank}'s {cache} deviates from the replay by {self.deviation:.2g} "
            f"({self.tensor}s, {self.measure})"
        )

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "sentence": self.sentence()}


def measure(taken: Samples, reference: Samples) -> dict[str, Array]:
    """Deviation by cache as [C, N, X, H, K], K over `MEASURES`: relative, and infinite where it has no measure."""
    import numpy as np

    mine = slice(taken.first_head, taken.heads.stop)
    samples_CNXHPD, sums_CNXHWM = reference.samples_CNXHPD[:, :, :, mine], reference.sums_CNXHWM[:, :, :, mine]
    text_CNXHM = reference.text_CNXHM[:, :, :, mine]
    live_C111 = (reference.spans_C3[:, 2] * reference.head_dim)[:, None, None, None]
    mean_CNXH = sums_CNXHWM[..., 1].sum(-1) / np.maximum(live_C111, 1)
    sampled_CNXH = _relative(np.abs(taken.samples_CNXHPD - samples_CNXHPD).max((-1, -2)), mean_CNXH)
    # Where a rank wrote elsewhere than the replay, its samples are of other places: nothing of that call agrees.
    sampled_CNXH[(taken.spans_C3 != reference.spans_C3).any(1)] = np.inf
    frame_values, text_values = (tokens * reference.head_dim for tokens in (reference.frame_tokens, reference.text_len))
    own_CNXHM = _of_sums(taken.sums_CNXHWM, sums_CNXHWM, frame_values).max(-2)
    text_CNXHM = _of_sums(taken.text_CNXHM, text_CNXHM, text_values)
    return {
        "text": np.concatenate([np.zeros_like(sampled_CNXH)[..., None], text_CNXHM], axis=-1),
        "self": np.concatenate([sampled_CNXH[..., None], own_CNXHM], axis=-1),
    }


def _of_sums(taken: Array, reference: Array, values: int) -> Array:
    """[..., M]: the plain sums against the sum of magnitudes, the signed one against what a root-mean of it adds up to.

    Rounding errors e of n values move a plain sum by n e at most, a signed one by about sqrt(n) e.
    """
    import numpy as np

    magnitude = reference[..., 1:2]
    limits = np.concatenate([magnitude, magnitude, magnitude / values**0.5], axis=-1)
    return _relative(np.abs(taken - reference), limits)


def _relative(gap: Array, scale: Array) -> Array:
    """gap / scale; what is equal is 0 whatever the scale, and what cannot be told is infinite."""
    import numpy as np

    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(gap == 0, 0.0, gap / scale)
    return np.where(np.isnan(ratio), np.inf, ratio)
