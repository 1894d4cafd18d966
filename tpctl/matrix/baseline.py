"""Compare a run with an earlier one, as ratios. Figures of another processor or torch are not compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpctl import snapshot
from tpctl.errors import BaselineError
from tpctl.output import plain, to_json
from tpctl.verdict import Finding, Verdict

SCHEMA, SCHEMA_VERSION = "tpctl.baseline", 1
RATIO_LIMIT = 1.25
FIGURES = ("period_p50_ms", "worker_peak_bytes", "worker_ready_s")


def key() -> dict[str, str]:
    """What makes figures comparable (`cpu`, `torch`), and which commit they belong to."""
    return {
        "cpu": snapshot.cpu_model(),
        "torch": snapshot.versions()["torch"],
        "commit": snapshot.commit(),
    }


def location(name: str) -> Path:
    """A path as it stands; a bare name lives in the user's data directory."""
    if "/" in name or name.endswith(".json") or Path(name).exists():
        return Path(name)
    import platformdirs

    return Path(platformdirs.user_data_dir("tpctl")) / "baselines" / f"{name}.json"


def save(name: str, cases: list[dict[str, Any]]) -> Path:
    """Write the figures of all cases that have some. Returns the file."""
    path = location(name)
    figures = {
        case["id"]: {figure: case["metrics"].get(figure) for figure in FIGURES} for case in cases if case["metrics"]
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "key": key(), "cases": plain(figures)}
    path.write_text(to_json(record, indent=2) + "\n", encoding="utf-8")
    return path


def read(name: str) -> dict[str, Any]:
    """A baseline file or name, or a run directory with its result.json.

    Raises:
        BaselineError: missing, not JSON, or of a schema that this tool does not know.
    """
    path = location(name)
    path = path / "result.json" if path.is_dir() else path
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BaselineError(f"cannot read the baseline {path}: {error.strerror}", code="TP-7402") from error
    except ValueError as error:
        raise BaselineError(f"{path} is not JSON: {error}", code="TP-7403") from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema not in (SCHEMA, "tpctl.bringup") or data.get("schema_version") != SCHEMA_VERSION:
        raise BaselineError(f"{path} is neither a baseline nor a bring-up result that this tpctl reads", code="TP-7404")
    if schema == SCHEMA:
        return dict(data)
    cases = {case["id"]: case["metrics"] for case in data["data"]["cases"]}
    return {"key": data["data"]["host"], "cases": cases}


def compare(case: str, figures: Mapping[str, Any], base: Mapping[str, Any], here: Mapping[str, str]) -> list[Finding]:
    """Ratios of this case over the baseline: WARN above the limit, UNCHECKED where they cannot be compared."""
    other = base["key"]
    unlike = [name for name in ("cpu", "torch") if other.get(name) != here[name]]
    if unlike:
        said = ", ".join(f"{name} is {here[name]}, was {other.get(name)}" for name in unlike)
        return [Finding("baseline", Verdict.UNCHECKED, f"not comparable: {said}")]
    then = base["cases"].get(case)
    if not then:
        return []
    found = []
    for figure in FIGURES:
        now, before = figures.get(figure), then.get(figure)
        if not now or not before:
            continue
        ratio = now / before
        verdict = Verdict.WARN if ratio > RATIO_LIMIT else Verdict.PASS
        words = f"{figure}: {ratio:.2f} times the baseline of {str(other.get('commit'))[:12]}"
        found.append(Finding(f"baseline.{figure}", verdict, words, ratio, RATIO_LIMIT))
    return found
