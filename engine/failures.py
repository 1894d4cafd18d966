"""Whatever ends a rank becomes one of our errors, and is written down before the rank leaves."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

import torch

from engine.errors import CommError, EngineError
from engine.lifecycle import RankExit, RankState
from engine.report import RankReport


def guard(run: Callable[[], None], report: RankReport) -> int:
    """Run; whatever ends the rank is written down before it leaves, with one sentence on stderr."""
    try:
        run()
    except EngineError as error:
        report.error, report.exit_code = error.to_record(), error.exit_code
        print(f"rank {report.rank}: {error.code} {error.fm or ''}: {error.message}", file=sys.stderr)
        print(f"next: {error.next_step}", file=sys.stderr, flush=True)
    except Exception as error:  # noqa: BLE001 - the boundary: a bug is recorded like any other cause of death
        ours = CommError(str(error)) if isinstance(error, torch.distributed.DistError) else EngineError(repr(error))
        report.error, report.exit_code = ours.to_record(), ours.exit_code
        traceback.print_exc()
        print(f"rank {report.rank}: {ours.code}: {ours.message}", file=sys.stderr, flush=True)
    else:
        report.exit_code = int(RankExit.DRAINED)
        report.move(RankState.EXITED)
    if report.exit_code:
        report.move(RankState.ABORTED)
    report.write()
    return report.exit_code or 0
