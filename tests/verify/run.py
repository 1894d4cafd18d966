"""Check the protocol models: every property must hold, and every guard, switched off, must be missed.

    python tests/verify/run.py [--only WORD] [--list]

Each row of `ROWS` is one run of spin over a bounded state space, on one core, within MEMORY_MIB and LIMIT_S. A row with
`broken_by` switches a guard off and passes only if spin finds a counterexample that says so; such a row is the proof
that the property beside it can fail. Standard library only; needs spin and a C compiler.

Exit codes: 0 every verdict as expected; 1 a verdict differs, or a search did not finish; 5 spin or the compiler is
missing.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
MEMORY_MIB = 800
LIMIT_S = 90
DEPTH = 20_000
EXIT_FAILED = 1
EXIT_NO_SPIN = 5
HINT = "Debian and Ubuntu: apt-get install spin gcc; macOS: brew install spin; source: https://spinroot.com"

# What pan says of a state in which somebody waits and nothing can happen, and of a run in which that lasts.
STUCK = "invalid end state"
FOREVER = "acceptance cycle"
EVERY_TP_FAULT = "F_KILL F_FREEZE F_LOSE F_REPEAT F_PREFLIGHT F_AFTER F_ALTER"
SPOKEN_TP_FAULTS = "F_KILL F_REPEAT F_PREFLIGHT F_AFTER F_ALTER"
EVERY_PP_FAULT = "F_KILL F_FREEZE F_LOSE F_LATE F_REPEAT F_REJECT F_ALTER"
SPOKEN_PP_FAULTS = "F_KILL F_LATE F_REPEAT F_REJECT F_ALTER"


@dataclass(frozen=True)
class Row:
    """One run. `broken_by`: a part of the counterexample that must be found; None where the property must hold.

    `live` checks the LTL property `everyone_leaves` under weak fairness; otherwise every assertion and every end state.
    """

    model: str
    name: str
    flags: str
    broken_by: str | None = None
    live: bool = False


ROWS = (
    Row("tp", "no fault: all drain, in order", "CHUNKS=3"),
    Row("tp", "any one fault: nobody waits, one advance", EVERY_TP_FAULT),
    Row("tp", "a fault that speaks needs no watchdog", f"{SPOKEN_TP_FAULTS} NO_WATCHDOG"),
    Row("tp", "kills without closed connections", "F_KILL NO_CLOSE"),
    Row("tp", "two faults, one chunk", "F_KILL F_LOSE FAULTS=2 CHUNKS=1"),
    Row("tp", "everyone leaves", f"{EVERY_TP_FAULT} CHUNKS=1", live=True),
    Row("tp", "stopped rank, no watchdog", "F_FREEZE NO_WATCHDOG", STUCK),
    Row("tp", "lost part, no watchdog", "F_LOSE NO_WATCHDOG", STUCK),
    Row("tp", "lost part, no watchdog: for ever", "F_LOSE NO_WATCHDOG CHUNKS=1", FOREVER, live=True),
    Row("tp", "killed rank, no watchdog, none closes", "F_KILL NO_WATCHDOG NO_CLOSE", STUCK),
    Row("tp", "stopped rank, no supervisor", "F_FREEZE NO_SUPERVISOR", STUCK),
    Row("tp", "packing fails after the header", "F_PREFLIGHT NO_PREFLIGHT", "code[0]==70"),
    Row("tp", "leader fails without farewell", "F_AFTER NO_LEADER_ERROR", "code[0]==70"),
    Row("tp", "frame twice, ids unchecked", "F_REPEAT NO_DUPLICATE_CHECK", "advanced["),
    Row("tp", "plan altered, calls not agreed", "F_ALTER NO_CALL_AGREEMENT", "kind_of["),
    Row("pp", "no fault: all answered, all drain", "CUTS=2"),
    Row("pp", "any one fault: nobody waits, none stale", f"{EVERY_PP_FAULT} CHUNKS=2"),
    Row("pp", "a fault that speaks needs no watchdog", f"{SPOKEN_PP_FAULTS} NO_WATCHDOG CHUNKS=3"),
    Row("pp", "lost message, hard cut in flight", "F_LOSE CHUNKS=3"),
    Row("pp", "queues of one", "F_KILL F_LATE F_REPEAT NO_WATCHDOG D_IN=1 D_OUT=1 CHUNKS=3"),
    Row("pp", "delay, repeat: two at once", "F_LATE F_REPEAT FAULTS=2 NO_WATCHDOG CHUNKS=3"),
    Row("pp", "everyone leaves", f"{EVERY_PP_FAULT} CHUNKS=1", live=True),
    Row("pp", "everyone leaves, hard cut in flight", f"{SPOKEN_PP_FAULTS} F_LOSE CHUNKS=2", live=True),
    Row("pp", "stopped rank, no watchdog", "F_FREEZE NO_WATCHDOG", STUCK),
    Row("pp", "lost message, no watchdog", "F_LOSE NO_WATCHDOG", STUCK),
    Row("pp", "lost message, no watchdog: for ever", "F_LOSE NO_WATCHDOG CHUNKS=2", FOREVER, live=True),
    Row("pp", "killed rank, no watchdog, none closes", "F_KILL NO_WATCHDOG NO_CLOSE", STUCK),
    Row("pp", "stopped rank, no supervisor", "F_FREEZE NO_SUPERVISOR CHUNKS=2", STUCK),
    Row("pp", "stale result, epoch unchecked", "NO_EPOCH_CHECK", "born==epoch"),
    Row("pp", "result twice, unchecked", "F_REPEAT NO_RESULT_CHECK", "state[chunk]==1"),
    Row("pp", "envelope twice, unchecked", "F_REPEAT NO_DUPLICATE_CHECK", "advanced["),
    Row("pp", "result ahead, unchecked", "F_LATE NO_AHEAD_CHECK", "chunk==expected"),
    Row("pp", "stale before duplicate: account is off", "F_REPEAT EPOCH_BEFORE_DUPLICATE", "accepted=="),
    Row("pp", "rejected without ERROR on the mesh", "F_REJECT NO_LEADER_ERROR", "code[0]==73"),
    Row("pp", "rejected without an answer", "F_REJECT NO_ANSWER", "asked==answered"),
    Row("pp", "validated after the mesh is entered", "F_REJECT LATE_VALIDATION", "code[0]==73"),
    Row("pp", "plan altered, calls not agreed", "F_ALTER NO_CALL_AGREEMENT", "kind_of["),
    Row("pp", "comms thread waits for one direction", "BLOCKING_COMMS", STUCK),
    Row("pp", "Stage 0 waits for room in d_in", "BLOCKING_PUT D_IN=1 D_OUT=1 CHUNKS=6", STUCK),
)


@dataclass(frozen=True)
class Outcome:
    """`error` is pan's own line, "" when the search was complete and found nothing."""

    error: str
    states: int
    seconds: float
    finished: bool
    trace: str = ""


def missing_tools() -> list[str]:
    """Names of what a run needs and this machine lacks."""
    return [name for name, found in (("spin", shutil.which("spin")), ("gcc", _compiler())) if not found]


def check(row: Row, folder: Path) -> Outcome:
    """Build and run one row in an empty folder.

    Raises:
        subprocess.CalledProcessError: spin or the compiler refuses the model.
    """
    started = time.monotonic()
    defines = [f"-D{flag}" for flag in row.flags.split()]
    model = str(HERE / f"{row.model}.pml")
    _tool(["spin", "-a", *defines, model], folder)
    # Partial order reduction is off: it saves nothing here, and is unsound beside `provided` and `unless`.
    build = ["-O0", "-w", "-DNOREDUCE", f"-DMEMLIM={MEMORY_MIB}", "-DVECTORSZ=1024"]
    build += ["-DNFAIR=3"] if row.live else ["-DSAFETY", "-DNOCLAIM"]
    _tool(["gcc", *build, "-o", "pan", "pan.c"], folder)
    command = ["./pan", f"-m{DEPTH}", "-w23", *(["-a", "-f"] if row.live else [])]
    try:
        text = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=LIMIT_S, check=False).stdout
    except subprocess.TimeoutExpired:
        return Outcome("", 0, time.monotonic() - started, False)
    errors = re.search(r"errors: (\d+)", text)
    states = re.search(r"(\d+) states, stored", text)
    lines = [line.removeprefix("pan:1: ") for line in text.splitlines() if line.startswith("pan:1: ")]
    whole = "max search depth too small" not in text and "reached -DMEMLIM" not in text and "out of memory" not in text
    finished = errors is not None and (bool(lines) or whole) and (int(errors[1]) > 0) == bool(lines)
    error = lines[0] if lines else ""
    trace = ""
    if error and row.broken_by is None:
        trace = _tool(["spin", "-k", f"{row.model}.pml.trail", "-p", "-g", *defines, model], folder, may_fail=True)
    return Outcome(error, int(states[1]) if states else 0, time.monotonic() - started, finished, trace)


def verdict(row: Row, outcome: Outcome) -> tuple[bool, str]:
    """Whether the outcome is the expected one, and how it reads in the table."""
    if not outcome.finished:
        return False, f"NOT FINISHED within {LIMIT_S} s and {MEMORY_MIB} MiB"
    if row.broken_by is None:
        return not outcome.error, f"VIOLATED: {outcome.error}" if outcome.error else "holds"
    if not outcome.error:
        return False, "NO COUNTEREXAMPLE: the property cannot fail"
    if row.broken_by not in outcome.error:
        return False, f"another counterexample than '{row.broken_by}': {outcome.error}"
    return True, "counterexample, as it must"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests/verify/run.py", description="Check the protocol models with spin.")
    parser.add_argument("--only", metavar="WORD", default="", help="rows whose model, name or flags contain WORD")
    parser.add_argument("--list", action="store_true", help="print the rows and leave")
    arguments = parser.parse_args(argv)
    rows = [row for row in ROWS if arguments.only in f"{row.model} {row.name} {row.flags}"]
    if not rows:
        parser.error(f"no row contains '{arguments.only}'")
    if arguments.list:
        for row in rows:
            print(f"{row.model}  {row.name:<42}{row.flags}")
        return 0
    missing = missing_tools()
    if missing:
        print(f"make verify needs {' and '.join(missing)}, which this machine lacks. {HINT}", file=sys.stderr)
        return EXIT_NO_SPIN
    return _run(rows)


def _run(rows: list[Row]) -> int:
    started = time.monotonic()
    print(f"{'model':<7}{'property':<43}{'states':>9}{'seconds':>9}  verdict", flush=True)
    failed = 0
    for row in rows:
        with tempfile.TemporaryDirectory(prefix="verify-") as folder:
            try:
                outcome = check(row, Path(folder))
            except subprocess.CalledProcessError as error:
                print(f"{row.model}: {error.cmd[0]} refuses the model:\n{error.stdout}{error.stderr}", file=sys.stderr)
                return EXIT_FAILED
        good, words = verdict(row, outcome)
        name = row.name if row.broken_by is None else f"- {row.name}"
        print(f"{row.model:<7}{name:<43}{outcome.states:>9}{outcome.seconds:>9.1f}  {words}", flush=True)
        if not good:
            failed += 1
            print(f"       flags: {row.flags}", flush=True)
        if outcome.trace:
            print("\n".join(outcome.trace.splitlines()[-60:]), flush=True)
    proofs = sum(row.broken_by is not None for row in rows)
    held = "all as expected" if not failed else f"{failed} NOT as expected"
    print(f"{len(rows) - proofs} properties, {proofs} proofs that they can fail (marked -): {held}, ", end="")
    print(f"{time.monotonic() - started:.0f} s")
    return EXIT_FAILED if failed else 0


def _compiler() -> str | None:
    # spin itself calls gcc as its preprocessor, so no other compiler would be enough.
    return shutil.which("gcc")


def _tool(command: list[str], folder: Path, *, may_fail: bool = False) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=LIMIT_S, check=not may_fail)
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
