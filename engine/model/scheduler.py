"""Flow matching with few steps, as the causal Wan models are distilled for it (Self-Forcing's scheduler).

sigma(s) = shift s / (1 + (shift - 1) s) on the 1000 values s = 1 - i/1000. Each has the timestep 1000 sigma. A step
of the denoising list is looked up at the nearest timestep; the list itself is never warped.
"""

from __future__ import annotations

from torch import Tensor

from engine.errors import ConfigError

TRAIN_TIMESTEPS = 1000


class FlowMatchScheduler:
    """Pure arithmetic: no state but the table, no randomness.

    Args:
        shift: above 0; 1 leaves the sigmas evenly spaced.

    Raises:
        ConfigError: shift is not above 0.
    """

    def __init__(self, shift: float) -> None:
        if not shift > 0:
            raise ConfigError(f"schedule.shift must be above 0, is {shift}", code="TP-1010")
        self.shift = shift
        evenly = [1.0 - i / TRAIN_TIMESTEPS for i in range(TRAIN_TIMESTEPS)]
        self._sigmas = [shift * s / (1.0 + (shift - 1.0) * s) for s in evenly]

    def sigma(self, timestep: int) -> float:
        """The sigma whose timestep is nearest; of two equally near, the noisier.

        Raises:
            ConfigError: timestep is outside 0..1000.
        """
        if not 0 <= timestep <= TRAIN_TIMESTEPS:
            raise ConfigError(f"a denoising step must be in 0..{TRAIN_TIMESTEPS}, is {timestep}", code="TP-1010")
        return min(self._sigmas, key=lambda sigma: abs(TRAIN_TIMESTEPS * sigma - timestep))

    def to_x0(self, x: Tensor, flow: Tensor, timestep: int) -> Tensor:
        """x - sigma flow, in float64; the dtype of x comes back. Any one shape."""
        return (x.double() - self.sigma(timestep) * flow.double()).to(x.dtype)

    def renoise(self, x0: Tensor, noise: Tensor, next_timestep: int) -> Tensor:
        """(1 - sigma') x0 + sigma' noise, in float32; the dtype of noise comes back. Any one shape."""
        sigma = self.sigma(next_timestep)
        return ((1.0 - sigma) * x0.float() + sigma * noise.float()).to(noise.dtype)
