"""What pp.pml does with a result against what Stage 0 does: over every state that small runs can reach.

The model's rule is read from its text, guard by guard, and evaluated; nothing of it is written down here a second time.
The engine's answer is that of `engine.wire.expected.Expectations`, told the same sends and arrivals.
"""

from __future__ import annotations

import copy
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine.errors import FrameError
from engine.wire.expected import Expectations, Fate

MODEL = (Path(__file__).parent / "pp.pml").read_text(encoding="utf-8")
CONSTANTS = {name: int(value) for name, value in re.findall(r"^#define (\w+) (\d+)(?: .*)?$", MODEL, re.MULTILINE)}
CRASH = "crash"
CHUNKS, CUTS = 4, 2

# What the first act of a branch makes of the result.
ACTS = (("repeats++", Fate.REPEATED), ("dropped++", Fate.STALE), ("leave0(X_TRIPWIRE)", CRASH))


@dataclass(frozen=True)
class Branch:
    """`:: guard -> act`. The guard is None for `else`."""

    guard: str | None
    fate: str


@dataclass(frozen=True)
class State:
    """Stage 0 and what it knows: fate and epoch of each chunk that was sent, the epoch now, cuts so far."""

    fates: tuple[int, ...] = ()
    epochs: tuple[int, ...] = ()
    epoch: int = 0
    cuts: int = 0


def preprocess(text: str, defined: frozenset[str]) -> str:
    """The lines that a C preprocessor would leave of one part of the model."""
    kept, open_ = [], [True]
    for line in text.splitlines():
        words = line.split()
        if words[:1] == ["#ifdef"]:
            open_.append(words[1] in defined)
        elif words[:1] == ["#ifndef"]:
            open_.append(words[1] not in defined)
        elif words[:1] == ["#else"]:
            open_.append(not open_.pop())
        elif words[:1] == ["#endif"]:
            open_.pop()
        elif all(open_):
            kept.append(re.sub(r"/\*.*?\*/", "", line))
    assert open_ == [True]
    return "\n".join(kept)


def branches(*defined: str) -> list[Branch]:
    """The choices of `inline judge`, with these macros defined."""
    text = re.search(r"^inline judge\(chunk, born\) \{\n(.*?)^\}", MODEL, re.MULTILINE | re.DOTALL)
    assert text is not None
    body = preprocess(text[1], frozenset(defined))
    choice = re.search(r"^ {4}if\n(.*?)^ {4}fi;", body, re.MULTILINE | re.DOTALL)
    assert choice is not None
    found = []
    for guard, act in re.findall(r"^ {4}:: (.+?) -> *(.*?)$", choice[1], re.MULTILINE):
        fate = next((fate for words, fate in ACTS if act.startswith(words)), None)
        if guard == "else":
            assert act == ""
            assert "emitted++" in choice[1]
            found.append(Branch(None, Fate.ACCEPTED))
        else:
            assert fate is not None, f"a branch does what this test does not know: {act}"
            found.append(Branch(guard, fate))
    assert [branch.guard for branch in found].count(None) == 1
    return found


def expected_chunk(state: State) -> int:
    """The model's `expected`: the first chunk of this epoch that flies."""
    flying = CONSTANTS["FLYING"]
    ours = [fate == flying and epoch == state.epoch for fate, epoch in zip(state.fates, state.epochs, strict=True)]
    return next((chunk for chunk, so in enumerate(ours) if so), CHUNKS)


def by_the_model(rule: list[Branch], state: State, chunk: int) -> str:
    names = {
        **CONSTANTS,
        "state": state.fates,
        "chunk": chunk,
        "born": state.epochs[chunk],
        "epoch": state.epoch,
        "expected": expected_chunk(state),
    }
    said = [
        branch.fate
        for branch in rule
        if branch.guard is not None
        and eval(branch.guard.replace("&&", " and ").replace("||", " or "), {"__builtins__": {}}, names)
    ]
    assert len(said) <= 1, f"more than one branch of the model holds in {state} for chunk {chunk}: {said}"
    return said[0] if said else Fate.ACCEPTED


def by_the_engine(expectations: Expectations, state: State, chunk: int) -> str:
    """Settles the chunk in `expectations`, unless it is a crash."""
    try:
        return expectations.judge(chunk + 1, chunk, state.epochs[chunk], state.epoch)
    except FrameError:
        return CRASH


def sends(state: State) -> Iterator[State]:
    """The next chunk goes out: in this epoch, or in the next one, after a hard cut."""
    if len(state.fates) < CHUNKS:
        for cut in range(2 if state.fates and state.cuts < CUTS else 1):
            now = state.epoch + cut
            yield State((*state.fates, CONSTANTS["FLYING"]), (*state.epochs, now), now, state.cuts + cut)


def settled(state: State, chunk: int, fate: str) -> State:
    """The model's `settle`: a repeat changes nothing."""
    if fate == Fate.REPEATED:
        return state
    become = CONSTANTS["EMITTED" if fate == Fate.ACCEPTED else "DROPPED"]
    return State(
        tuple(become if i == chunk else old for i, old in enumerate(state.fates)),
        state.epochs,
        state.epoch,
        state.cuts,
    )


def walk(visit: Callable[[State, Expectations, int], str]) -> int:
    """Breadth first over everything that may be sent and may arrive: any chunk that was sent, at any time, again too.

    `visit` says what becomes of an arrival; returns the number of states.
    """
    start = State()
    seen = {start}
    todo = deque([(start, Expectations())])
    while todo:
        state, expectations = todo.popleft()
        following = []
        for after in sends(state):
            told = copy.deepcopy(expectations)
            told.sent(len(after.fates), len(after.fates) - 1, after.epoch)
            following.append((after, told))
        for chunk in range(len(state.fates)):
            told = copy.deepcopy(expectations)
            fate = visit(state, told, chunk)
            if fate != CRASH:
                following.append((settled(state, chunk, fate), told))
        for after, told in following:
            if after not in seen:
                seen.add(after)
                todo.append((after, told))
    return len(seen)


def differences(rule: list[Branch]) -> tuple[list[str], set[str], int]:
    """Where the model and the engine disagree, what the engine ever said, and how many states there are."""
    wrong: list[str] = []
    said: set[str] = set()

    def visit(state: State, expectations: Expectations, chunk: int) -> str:
        theirs, ours = by_the_model(rule, state, chunk), by_the_engine(expectations, state, chunk)
        said.add(ours)
        if theirs != ours:
            wrong.append(f"{state}: chunk {chunk} is {ours} to the engine, {theirs} to the model")
        return ours

    return wrong, said, walk(visit)


def test_model_and_engine_judge_every_result_alike():
    wrong, said, states = differences(branches())
    assert wrong == []
    assert said == {Fate.ACCEPTED, Fate.STALE, Fate.REPEATED, CRASH}
    assert states > 200


@pytest.mark.parametrize("switch", ["NO_RESULT_CHECK", "NO_EPOCH_CHECK", "NO_AHEAD_CHECK", "EPOCH_BEFORE_DUPLICATE"])
def test_a_rule_that_the_model_lacks_is_missed(switch: str):
    """The proof that the comparison can fail: each guard of the model switched off, or the order of two of them."""
    try:
        wrong, _, _ = differences(branches(switch))
    except AssertionError as error:  # without one guard, two others hold at once
        assert "more than one branch" in str(error)  # noqa: PT017
    else:
        assert wrong


@pytest.mark.parametrize("fate", [Fate.REPEATED, Fate.STALE, CRASH])
def test_a_rule_that_the_engine_lacks_is_missed(fate: str, monkeypatch: pytest.MonkeyPatch):
    """An engine that takes for good what it must drop, or crash on."""
    judge = Expectations.judge

    def lenient(self: Expectations, call_id: int, chunk_index: int, cache_epoch: int, now: int) -> Fate:
        try:
            said = judge(self, call_id, chunk_index, cache_epoch, now)
        except FrameError:
            if fate != CRASH:
                raise
            return Fate.ACCEPTED
        return Fate.ACCEPTED if said == fate else said

    monkeypatch.setattr(Expectations, "judge", lenient)
    assert differences(branches())[0]
