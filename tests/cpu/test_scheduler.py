"""The few-step flow-matching scheduler, against its formulas and against the bits they must survive."""

from __future__ import annotations

import pytest
import torch

from engine.errors import ConfigError
from engine.model.scheduler import FlowMatchScheduler


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
@pytest.mark.parametrize("step", [1000, 937, 750, 500, 250, 1])
def test_sigma_is_the_nearest_of_the_thousand(shift: float, step: int) -> None:
    s = 1.0 - torch.arange(1000, dtype=torch.float64) / 1000
    sigmas = shift * s / (1 + (shift - 1) * s)
    nearest = sigmas[(1000 * sigmas - step).abs().argmin()].item()
    assert FlowMatchScheduler(shift).sigma(step) == pytest.approx(nearest, abs=1e-15)


def test_steps_are_looked_up_not_warped() -> None:
    # Warped, 750 would be sigma(0.75) = 0.9375 at shift 5.
    scheduler = FlowMatchScheduler(5.0)
    assert scheduler.sigma(750) == pytest.approx(0.75, abs=1e-3)
    assert scheduler.sigma(1000) == 1.0
    assert scheduler.sigma(0) == pytest.approx(5 * 0.001 / 1.004, rel=1e-9)


def test_x0_is_taken_in_float64() -> None:
    scheduler = FlowMatchScheduler(5.0)
    x = torch.tensor([1e4, 1.0, -3.0])
    flow = torch.tensor([1e4, 1.0 + 2**-20, 7.0])
    want = [a - scheduler.sigma(500) * b for a, b in zip(x.tolist(), flow.tolist(), strict=True)]
    got = scheduler.to_x0(x, flow, 500)
    assert got.dtype == torch.float32
    assert torch.equal(got, torch.tensor(want, dtype=torch.float64).float())
    half = scheduler.to_x0(x.bfloat16(), flow.bfloat16(), 500)
    assert half.dtype == torch.bfloat16


def test_renoise_then_the_true_flow_gives_x0_back() -> None:
    scheduler = FlowMatchScheduler(5.0)
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(2, 3, 4, generator=generator) for _ in range(2))
    for step in (1000, 750, 250):
        x = scheduler.renoise(x0, noise, step)
        sigma = scheduler.sigma(step)
        torch.testing.assert_close(x, (1 - sigma) * x0 + sigma * noise, rtol=0, atol=1e-6)
        torch.testing.assert_close(scheduler.to_x0(x, noise - x0, step), x0, rtol=0, atol=1e-6)
    assert torch.equal(scheduler.renoise(x0, noise, 1000), noise)
    assert scheduler.renoise(x0, noise.bfloat16(), 750).dtype == torch.bfloat16


@pytest.mark.parametrize("step", [-1, 1001])
def test_steps_outside_the_table_are_refused(step: int) -> None:
    with pytest.raises(ConfigError, match=str(step)):
        FlowMatchScheduler(5.0).sigma(step)


@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan")])
def test_a_shift_that_makes_no_table_is_refused(shift: float) -> None:
    with pytest.raises(ConfigError, match=r"schedule\.shift"):
        FlowMatchScheduler(shift)
