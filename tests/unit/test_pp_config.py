"""Plans pp0 and pp1 in the configuration: ranks, depths, regimes, and what is refused."""

import pytest

from engine.config import EngineConfig, from_dict
from engine.errors import ConfigError


@pytest.mark.parametrize(("plan", "tp", "world"), [("pp0", 1, 2), ("pp1", 1, 2), ("pp1", 2, 3)])
def test_stage0_is_a_rank_of_its_own(plan: str, tp: int, world: int) -> None:
    assert EngineConfig().replace(plan__tp_plan=plan, plan__tp=tp).world_size == world


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pipeline__d_in": 0}, "pipeline.d_in must be at least 1, is 0"),
        ({"pipeline__d_out": 0}, "pipeline.d_out must be at least 1, is 0"),
        ({"pipeline__d_out": -1}, "pipeline.d_out must be at least 1, is -1"),
        ({"pipeline__join_timeout_s": 0.0}, "pipeline.join_timeout_s must be above 0"),
        ({"pipeline__cut": "later"}, "must be one of: discard, finish"),
        ({"plan__tp_plan": "pp0", "plan__tp": 2}, "plan pp0 has a mesh of one rank"),
        ({"plan__tp_plan": "pp2"}, "did you mean 'pp"),
    ],
)
def test_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EngineConfig().replace(**changes)


def test_r0_is_never_an_accident() -> None:
    assert from_dict({}).regime == "R0a"
    assert from_dict({"schedule": {"anchor": "latent"}}).regime == "R0"
    assert from_dict({"schedule": {"recompute": False}}).regime == "R1"
