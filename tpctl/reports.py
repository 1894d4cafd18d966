"""The reports that ranks leave in their run directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SCHEMA, VERSION = "tpctl.rank-report", 1


def read_reports(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Rank reports by rank. A file that is damaged or of an unknown schema counts as no report."""
    reports = {}
    for path in sorted((run_dir / "ranks").glob("rank*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if (
            isinstance(data, dict)
            and data.get("schema") == SCHEMA
            and data.get("schema_version") == VERSION
            and isinstance(data.get("rank"), int)
        ):
            reports[data["rank"]] = data | {"written_at": path.stat().st_mtime}
    return reports
