"""A bring-up as one HTML file that needs no network: verdict first, then the table, the pictures, the evidence.

The page is made from the envelope alone, the same one that `result.json` holds, and links to what lies beside it.
"""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tpctl.matrix.metrics import MIB

Case = Mapping[str, Any]
HEALTHY = ("PASS", "SKIP")
OVERLAP_PICTURE = "overlap.svg"
# What a reader looks for first in a case's directory, in this order; patterns relative to it.
FILES = ("launcher.log", "logs/**/*.log", "stderr*.log", "referee.log", "ranks/*.log*", "ranks/*.json", "referee.json")
MADE = ("timeline.json", OVERLAP_PICTURE, "sheet.png", "video.mp4", "config.toml")
MAX_LINKS = 24


@dataclass(frozen=True)
class Bar:
    """One value of a chart: its words, and its length as a share of the longest, in percent."""

    label: str
    words: str
    percent: float
    series: str


@dataclass(frozen=True)
class Row:
    """One case of a chart."""

    case: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Chart:
    """`axis` says what the lengths mean; `legend` is series and its name."""

    title: str
    axis: str
    legend: tuple[tuple[str, str], ...]
    rows: tuple[Row, ...]


def render(envelope: Mapping[str, Any], page: Path) -> str:
    """The HTML of a bring-up's envelope, to be written to `page`: its links are relative to there."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    templates = Environment(
        loader=PackageLoader("tpctl", "matrix"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    cases: list[Case] = envelope["data"]["cases"]
    return templates.get_template("bringup.html.j2").render(
        report=envelope,
        cases=[_case(case, page) for case in cases],
        bad=[_case(case, page) for case in cases if case["verdict"] not in HEALTHY],
        counts=_counts(cases),
        charts=[chart for chart in (_memory(cases), _start_up(cases), _detection(cases)) if chart.rows],
        overlaps=[found for case in cases if (found := _overlap(case)) is not None],
        ratios=_ratios(cases),
    )


def _case(case: Case, page: Path) -> dict[str, Any]:
    figures = case["metrics"]
    return {
        **case,
        "cells": {
            "rel.err": _number(figures.get("latents_error"), "{:.0e}"),
            "MiB": _mib(figures.get("worker_peak_bytes")),
            "ready s": _number(figures.get("worker_ready_s"), "{:.1f}"),
            "period ms": _number(figures.get("period_p50_ms"), "{:.0f}"),
            "fps": _number(figures.get("fps"), "{:.1f}"),
            "overlap": _number(figures.get("overlap_score"), "{:.2f}"),
        },
        "note": _note(case),
        "answered": f"{case['coverage']['checked']}/{case['coverage']['expected']}",
        "failed": [row for row in case["findings"] if row["verdict"] not in HEALTHY],
        "links": _links(Path(case["run_dir"]), page),
    }


def _note(case: Case) -> str:
    figures = case["metrics"]
    words = []
    if figures.get("regime") == "R0":
        words.append("R0: anchors from latents")
    if figures.get("blame"):
        words += [str(figures[key]) for key in ("code", "fm") if figures.get(key)]
        words.append(f"blamed: {figures['blame']}")
    elif case["reference"] is None and case["metrics"].get("ranks"):
        words.append("reference")
    return ", ".join(words)


def _counts(cases: Sequence[Case]) -> list[tuple[str, int]]:
    found: dict[str, int] = {}
    for case in cases:
        found[case["verdict"]] = found.get(case["verdict"], 0) + 1
    return sorted(found.items())


def _memory(cases: Sequence[Case]) -> Chart:
    values = {
        case["id"]: [
            ("rank 0", _of(case, "leader_peak_bytes"), "stage0"),
            ("worker", _of(case, "worker_peak_bytes") if len(case["metrics"].get("ranks") or {}) > 1 else None, "mesh"),
        ]
        for case in cases
    }
    return _chart("Peak memory", "MiB of resident memory, largest worker", values, lambda size: f"{size / MIB:.0f} MiB")


def _start_up(cases: Sequence[Case]) -> Chart:
    values = {
        case["id"]: [
            ("rank 0", (case["metrics"].get("ranks") or {}).get("0", {}).get("ready_s"), "stage0"),
            ("worker", _of(case, "worker_ready_s") if len(case["metrics"].get("ranks") or {}) > 1 else None, "mesh"),
        ]
        for case in cases
    }
    return _chart("Start-up", "seconds until a rank could take a chunk", values, lambda s: f"{s:.1f} s")


def _detection(cases: Sequence[Case]) -> Chart:
    """Times over four decades: a logarithmic length, from 1 ms on."""
    values = {
        case["id"]: [("named", _of(case, "first_failure_ms"), "stage0"), ("all gone", _of(case, "gone_ms"), "mesh")]
        for case in cases
    }
    return _chart(
        "Detection",
        "milliseconds from the fault to the first failure named, and to the last process gone; logarithmic from 1 ms",
        values,
        lambda ms: f"{ms:.0f} ms",
        lambda ms: math.log10(max(ms, 1.0)),
    )


def _chart(
    title: str,
    axis: str,
    values: Mapping[str, Sequence[tuple[str, float | None, str]]],
    words: Callable[[float], str],
    scale: Callable[[float], float] = float,
) -> Chart:
    longest = max((scale(value) for bars in values.values() for _, value, _ in bars if value is not None), default=0.0)
    rows = []
    legend: dict[str, str] = {}
    for case, bars in values.items():
        drawn = []
        for label, value, series in bars:
            if value is not None:
                drawn.append(Bar(label, words(value), 100 * scale(value) / (longest or 1.0), series))
                legend[series] = label
        if drawn:
            rows.append(Row(case, tuple(drawn)))
    return Chart(title, axis, tuple(legend.items()), tuple(rows))


def _overlap(case: Case) -> dict[str, Any] | None:
    """The picture that the case left, as a data URL: inside `img`, it brings its own light and dark."""
    try:
        drawn = (Path(case["run_dir"]) / OVERLAP_PICTURE).read_bytes()
    except OSError:
        return None
    url = "data:image/svg+xml;base64," + base64.b64encode(drawn).decode("ascii")
    return {"case": case["id"], "url": url, "score": _number(case["metrics"].get("overlap_score"), "{:.2f}")}


def _ratios(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """This run over the baseline; rows without a ratio say why there is none."""
    return [
        {"case": case["id"], "figure": row["id"].removeprefix("baseline").lstrip("."), **row}
        for case in cases
        for row in case["findings"]
        if row["id"].startswith("baseline")
    ]


def _links(run_dir: Path, page: Path) -> list[tuple[str, str]]:
    """Name and relative URL of what the case left, logs first."""
    found: list[Path] = []
    for pattern in (*FILES, *MADE):
        found += sorted(path for path in run_dir.glob(pattern) if path.is_file() and path not in found)
    base = page.resolve().parent
    return [
        (str(path.relative_to(run_dir)), quote(os.path.relpath(path.resolve(), base))) for path in found[:MAX_LINKS]
    ]


def _of(case: Case, figure: str) -> float | None:
    value = case["metrics"].get(figure)
    return None if value is None else float(value)


def _mib(size: float | None) -> str:
    return _number(None if size is None else size / MIB, "{:.0f}")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else "0" if value == 0 else form.format(value)
