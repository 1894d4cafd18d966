"""The models' tables against the engine's, value by value; and the models themselves, where spin is installed."""

from __future__ import annotations

import ast
import itertools
import operator
import re
from pathlib import Path

import pytest

from engine.lifecycle import RankExit, RankState, can_move
from engine.wire.header import (
    LEADER_ACCEPT,
    MESH_ACCEPT,
    SCHEMAS_OF,
    STAGE0_ACCEPT,
    Action,
    Header,
    LinkState,
    Schema,
    size_problem,
)
from engine.wire.header import Limits as WireLimits
from tests.verify import run

HERE = Path(__file__).parent
MACRO = re.compile(r"^#define (\w+)(?:\(([^)]*)\))? (.*?)(?:/\*.*)?$", re.MULTILINE)

COMPARE = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


class Tables:
    """The macros of tables.pml as numbers and functions: comparisons, sums, and, or; nothing else is understood."""

    def __init__(self, text: str) -> None:
        self.macros: dict[str, tuple[list[str], ast.expr]] = {}
        for name, parameters, body in MACRO.findall(text):
            python = body.replace("&&", " and ").replace("||", " or ").strip()
            tree = ast.parse(python, mode="eval").body
            self.macros[name] = ([p.strip() for p in parameters.split(",") if p.strip()], tree)

    def named(self, prefix: str) -> dict[str, int]:
        """Every constant whose name starts so, without the prefix."""
        return {n.removeprefix(prefix): self.value(n) for n in self.macros if n.startswith(prefix)}

    def value(self, name: str, *arguments: int) -> int:
        parameters, tree = self.macros[name]
        return self._value(tree, dict(zip(parameters, arguments, strict=True)))

    def holds(self, name: str, *arguments: int) -> bool:
        return bool(self.value(name, *arguments))

    def _value(self, node: ast.expr, names: dict[str, int]) -> int:
        match node:
            case ast.Constant(value=int(value)):
                return value
            case ast.Name(id=name):
                return names[name] if name in names else self.value(name)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self._value(operand, names)
            case ast.BinOp(op=ast.Add(), left=left, right=right):
                return self._value(left, names) + self._value(right, names)
            case ast.BoolOp(op=ast.And(), values=values):
                return int(all(self._value(v, names) for v in values))
            case ast.BoolOp(op=ast.Or(), values=values):
                return int(any(self._value(v, names) for v in values))
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                a, b = self._value(left, names), self._value(right, names)
                return int(COMPARE[type(op)](a, b))
        raise AssertionError(f"tables.pml holds an expression that this test does not know: {ast.unparse(node)}")


TABLES = Tables((HERE / "tables.pml").read_text(encoding="utf-8"))


def header(
    action: Action, *, call_id: int = 0, chunk: int = -1, epoch: int = 0, meta: int = 0, tensors: int = 0
) -> Header:
    schema = min(SCHEMAS_OF[action])
    return Header(action, call_id, chunk, epoch, 0, schema, 1, meta, tensors, 16 * tensors, 0)


def test_actions_have_the_numbers_of_the_wire():
    assert TABLES.named("A_") == {action.name: int(action) for action in Action}


def test_what_follows_a_header():
    for action in Action:
        assert TABLES.holds("HAS_META", action) == (Schema.NONE not in SCHEMAS_OF[action])
        carries = size_problem(header(action, meta=int(action is not Action.NOOP), tensors=1), WireLimits())
        allowed = carries is None or carries.field != "tensor_count"
        if action not in (Action.NOOP, Action.SHUTDOWN):
            assert TABLES.holds("HAS_PAYLOAD", action) == allowed
        else:
            assert not TABLES.holds("HAS_PAYLOAD", action)


@pytest.mark.parametrize(
    ("table", "accepted"),
    [("MESH_ACCEPTS", MESH_ACCEPT), ("LEADER_ACCEPTS", LEADER_ACCEPT), ("STAGE0_ACCEPTS", STAGE0_ACCEPT)],
)
def test_every_receiver_accepts_what_its_model_does(table: str, accepted: frozenset[Action]):
    assert {action for action in Action if TABLES.holds(table, action)} == accepted


def test_results_go_to_stage0_and_nowhere_else():
    for action in Action:
        assert TABLES.holds("STAGE0_ACCEPTS", action) == (action is Action.RESULT)
        assert not (TABLES.holds("STAGE0_ACCEPTS", action) and TABLES.holds("LEADER_ACCEPTS", action))


def test_identifier_rules_are_those_of_the_link():
    seen = set()
    grid = itertools.product(Action, range(-1, 4), range(-1, 4), range(-1, 4), range(-1, 4), range(4), range(4))
    for action, call_id, last_call, chunk, last_chunk, epoch, now in grid:
        link = LinkState(last_call, last_chunk, now)
        problem = link.problem(header(action, call_id=call_id, chunk=chunk, epoch=epoch))
        expected = None
        if not TABLES.holds("CALL_OK", call_id, last_call):
            expected = "call_id"
        elif not TABLES.holds("CHUNK_OK", action, chunk, last_chunk):
            expected = "chunk_index"
        elif not TABLES.holds("EPOCH_OK", action, epoch, now):
            expected = "cache_epoch"
        assert (problem.field if problem else None) == expected, (action, call_id, last_call, chunk, last_chunk, epoch)
        seen.add(expected)
    assert seen == {None, "call_id", "chunk_index", "cache_epoch"}


def test_the_epoch_against_init_cache():
    seen = set()
    for epoch, now, init, last in itertools.product(range(3), range(3), (0, 1), (-1, 0, 1)):
        if epoch < now:
            continue  # refused before by EPOCH_OK
        problem = LinkState(0, last, now).cut_problem(header(Action.INFER, epoch=epoch), bool(init))
        assert TABLES.holds("CUT_OK", epoch, now, init, last) == (problem is None), (epoch, now, init, last)
        seen.add(problem is None)
    assert seen == {True, False}


def test_exit_codes_of_the_models_are_those_of_the_ranks():
    used = TABLES.named("X_")
    assert {name: int(RankExit[name]) for name in used} == used


def test_states_and_every_pair_of_moves():
    states = TABLES.named("S_")
    assert list(states) == [state.name for state in RankState]
    for old, new in itertools.product(RankState, RankState):
        assert TABLES.holds("CAN_MOVE", states[old.name], states[new.name]) == can_move(old, new), (old, new)


def test_every_guard_and_fault_of_a_row_exists_in_its_model():
    """A misspelt macro would switch nothing, and its row would prove nothing."""
    shared = (HERE / "ranks.pml").read_text(encoding="utf-8")
    for row in run.ROWS:
        text = shared + (HERE / f"{row.model}.pml").read_text(encoding="utf-8")
        for flag in row.flags.split():
            assert re.search(rf"^#ifn?def {flag.partition('=')[0]}$", text, re.MULTILINE), (row, flag)


def test_every_guard_of_the_models_is_switched_off_by_some_row():
    for model in ("tp", "pp"):
        text = (HERE / f"{model}.pml").read_text(encoding="utf-8")
        guards = set(re.findall(r"^#ifn?def ((?:NO_|LATE_|BLOCKING_|EPOCH_BEFORE)\w+)$", text, re.MULTILINE))
        proved = {f for row in run.ROWS if row.model == model and row.broken_by for f in row.flags.split()}
        assert guards
        assert guards <= proved, f"{model}: no row proves {sorted(guards - proved)}"


def test_a_verdict_is_only_good_for_the_expected_reason():
    holds, broken = run.Row("tp", "p", ""), run.Row("tp", "p", "", run.STUCK)
    clean, stuck = run.Outcome("", 9, 0.1, True), run.Outcome("invalid end state (at depth 3)", 9, 0.1, True)
    other, cut = run.Outcome("assertion violated x", 9, 0.1, True), run.Outcome("", 9, 0.1, False)
    good = {
        (row, outcome)
        for row in (holds, broken)
        for outcome in (clean, stuck, other, cut)
        if run.verdict(row, outcome)[0]
    }
    assert good == {(holds, clean), (broken, stuck)}


def test_without_spin_the_driver_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert run.main([]) == run.EXIT_NO_SPIN
    said = capsys.readouterr().err
    assert "spin" in said
    assert "apt-get install spin" in said


QUICK = [row for row in run.ROWS if row.name.startswith("no fault") or row.broken_by]


@pytest.mark.skipif(bool(run.missing_tools()), reason=f"needs {' and '.join(run.missing_tools())}: {run.HINT}")
@pytest.mark.slow
@pytest.mark.parametrize("row", QUICK, ids=lambda row: f"{row.model} {row.name}")
def test_model(row: run.Row, tmp_path: Path):
    """The cheap rows: healthy runs and proofs. `make verify` runs all of them."""
    outcome = run.check(row, tmp_path)
    good, words = run.verdict(row, outcome)
    assert good, words
    assert outcome.states > 0
