"""Legal transitions, and the exit codes of the contract."""

import itertools

import pytest

from engine.lifecycle import TRANSITIONS, RankExit, RankState, can_move

PATH = ["starting", "joining", "loading", "warming", "running", "draining", "shutdown", "exited"]


def test_the_one_way_through():
    states = [RankState(name) for name in PATH]
    legal = {
        (a, b) for a, b in itertools.product(RankState, RankState) if b is not RankState.ABORTED and can_move(a, b)
    }
    assert legal == set(itertools.pairwise(states))


@pytest.mark.parametrize("state", RankState)
def test_every_living_state_may_abort_and_no_dead_one_moves(state):
    dead = state in (RankState.EXITED, RankState.ABORTED)
    assert can_move(state, RankState.ABORTED) is not dead
    assert (not TRANSITIONS[state]) == dead


def test_exit_codes_are_those_of_the_contract():
    assert {code.name: int(code) for code in RankExit} == {
        "DRAINED": 0, "TRIPWIRE": 70, "ORPHANED": 71, "PHASE_BUDGET": 72, "PEER_ERROR": 73, "TRANSPORT": 74,
        "PARITY": 75, "POISONED": 76, "BAD_CONFIG": 77,
    }  # fmt: skip
