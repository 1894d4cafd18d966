"""Runs command lines for real, without a shell, each at most once.

A line that begins with `tpctl` runs this interpreter's own. `{scratch}` stands for an empty directory that is gone
afterwards, the other placeholders for run directories that are made on demand, and once.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from tpctl.books.place import BookError
from tpctl.exitcodes import ExitCode, for_verdict
from tpctl.verdict import ANSWERED, Verdict, worst

PLACEHOLDER = re.compile(r"\{([a-z]+)\}")
# One small bring-up that the items of all checklists share: the reference, the TP plan and a pp plan.
BRINGUP = "tpctl bringup --case v1.1c-tp2 --case pp0-r0a -o json"
SCRATCH = "scratch"
CASES = {"run": "v1.1c-tp2", "pp": "pp0-r0a"}
ONE_DRILL = re.compile(r"tpctl drill ((?:OM|C)-[0-9]+[.a-z-]*) -o json")
# To bury what was killed.
BURY_S = 10.0


@dataclass(frozen=True)
class Ran:
    """A command that ran. `answered_by` is the command whose answer held this one's, where one run served several."""

    command: str
    code: int
    stdout: str
    stderr: str
    wall_s: float
    late: bool = False
    answered_by: str | None = None

    @property
    def document(self) -> Any:
        """The JSON on its stdout, or None."""
        try:
            return json.loads(self.stdout)
        except ValueError:
            return None


@dataclass
class Commands:
    """`given` are placeholders that the caller knows; `makes` says whether to make a run where none is given.

    `environment` is added to this process's own.
    """

    given: dict[str, str] = field(default_factory=dict)
    makes: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    done: dict[str, Ran] = field(default_factory=dict)

    def run(self, command: str, timeout_s: float) -> Ran:
        """The command's answer; from memory if it ran before.

        Raises:
            BookError: a placeholder that stands for nothing.
        """
        end = time.monotonic() + timeout_s
        line = self.fill(command, timeout_s)
        if line not in self.done:
            self.done[line] = replace(
                execute(shlex.split(line), end - time.monotonic(), self.environment, self.cwd), command=line
            )
        return self.done[line]

    def fill(self, command: str, timeout_s: float) -> str:
        """The command with every placeholder replaced."""
        for name in sorted(set(PLACEHOLDER.findall(command))):
            if name == SCRATCH:
                command = command.replace(f"{{{name}}}", self._scratch())
                continue
            if self.makes and name not in self.given and name in CASES:
                self._bring_up(timeout_s)
            if name not in self.given:
                raise BookError(
                    f"'{command}' needs a value for {{{name}}}", code="TP-8105", next_step=f"give --{name} VALUE"
                )
            command = command.replace(f"{{{name}}}", shlex.quote(self.given[name]))
        return command

    def _scratch(self) -> str:
        """An empty directory that goes when nobody holds these commands any more, or with the interpreter."""
        directory = mkdtemp(prefix="tpctl-scratch-")
        weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)
        return directory

    def _bring_up(self, timeout_s: float) -> None:
        ran = self.run(BRINGUP, timeout_s)
        data = (ran.document or {}).get("data") or {}
        if "run_dir" not in data:
            words = f"'{BRINGUP}' left no run directory: exit code {ran.code}{', too late' if ran.late else ''}"
            raise BookError(words, code="TP-8106", evidence={"stderr": ran.stderr[-500:]}, next_step=BRINGUP)
        root = Path(str(data["run_dir"])).resolve()
        self.given = {name: str(root / case) for name, case in CASES.items()} | self.given

    def batch(self, commands: Iterable[str], timeout_s: float, run_dir: Path) -> None:
        """Answer many `tpctl drill ID -o json` by one run of all their drills: torch is loaded once."""
        names = {match[1]: line for line in commands if (match := ONE_DRILL.fullmatch(line)) and line not in self.done}
        if len(names) < 2:
            return
        together = f"tpctl drill {' '.join(names)} --run-dir {shlex.quote(str(run_dir))} -o json"
        ran = self.run(together, timeout_s)
        for name, line in names.items():
            self.done[line] = narrowed(ran, name, line)


def narrowed(ran: Ran, name: str, command: str) -> Ran:
    """The part of many drills' answer that answers for one; where it is not there, the failure of them all."""
    document = ran.document
    rows = [
        row
        for row in ((document or {}).get("data") or {}).get("drills") or []
        if row["id"] == name or row["id"].startswith(f"{name}.")
    ]
    if not rows:
        code = ran.code or int(ExitCode.INCOMPLETE)
        return replace(ran, command=command, code=code, stdout="", answered_by=ran.command)
    verdict = worst(Verdict(row["verdict"]) for row in rows)
    answers = [Verdict(finding["verdict"]) for row in rows for finding in row["findings"]]
    counted = [answer for answer in answers if answer is not Verdict.SKIP]
    document["data"]["drills"] = rows
    document |= {
        "verdict": verdict.value,
        "coverage": {"checked": sum(answer in ANSWERED for answer in counted), "expected": len(counted)},
        "findings": [finding for finding in document["findings"] if finding["where"] in {row["id"] for row in rows}],
        "next": [],
    }
    text = json.dumps(document)
    return Ran(command, int(for_verdict(verdict)), text, ran.stderr, ran.wall_s, answered_by=ran.command)


def execute(argv: list[str], timeout_s: float, environment: Mapping[str, str], cwd: Path | None) -> Ran:
    """One process group, ended at the deadline. A program that is not there answers 127, as a shell says it."""
    if argv[0] == "tpctl":
        argv = [sys.executable, "-m", "tpctl", *argv[1:]]
    command, began = shlex.join(argv), time.monotonic()
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, **environment},
            cwd=cwd,
            start_new_session=True,
        )
    except FileNotFoundError:
        return Ran(command, 127, "", f"{argv[0]}: not installed here", 0.0)
    late = False
    try:
        stdout, stderr = process.communicate(timeout=max(0.0, timeout_s))
    except subprocess.TimeoutExpired:
        late = True
        os.killpg(process.pid, signal.SIGTERM)  # a bring-up or a drill then ends what it started
        try:
            stdout, stderr = process.communicate(timeout=BURY_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            stdout, stderr = process.communicate()
    return Ran(command, process.returncode, stdout, stderr, round(time.monotonic() - began, 3), late)
