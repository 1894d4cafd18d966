"""The HTML report of a bring-up: what it says, that it is one file, and how it looks in a real browser."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.cli.runs import CASE, chunk, observe, write_run
from tpctl.commands.bringup import envelope_of
from tpctl.matrix.cases import Matrix
from tpctl.matrix.cause import Cause
from tpctl.matrix.gates import evaluate
from tpctl.matrix.html import OVERLAP_PICTURE, render
from tpctl.matrix.metrics import metrics
from tpctl.matrix.runner import CaseResult
from tpctl.verdict import Finding, Verdict

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
PICTURE = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 90 20"><rect width="90" height="20"/></svg>'
HOST = {"cpu": "a processor", "torch": "2.13.0", "commit": "0123456789ab"}
# Asked of the laid out page, and left where --dump-dom shows it.
ASK = """<script>addEventListener("load", () => {
  const page = document.documentElement, said = document.createElement("pre");
  const broken = [...document.images].filter(image => !image.naturalWidth).length;
  const banner = document.querySelector(".banner .verdict").getBoundingClientRect();
  said.id = "asked";
  said.textContent = JSON.stringify({
    width: innerWidth, content: page.scrollWidth, broken, top: banner.top,
    ground: getComputedStyle(document.body).backgroundColor,
    bars: [...document.querySelectorAll(".bar > span:first-child")].map(bar => bar.getBoundingClientRect().width),
  });
  document.body.append(said);
})</script>"""


class Fetched(HTMLParser):
    """Collects whatever a browser would load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            loads = name in ("src", "srcset", "poster", "data") or (tag == "link" and name == "href")
            if loads and not (value or "").startswith("data:"):
                self.found.append(f"<{tag} {name}={value}>")


def fetched(page: str) -> list[str]:
    reader = Fetched()
    reader.feed(page)
    return reader.found + [line for line in page.splitlines() if "@import" in line or "url(" in line]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one healthy case, one that failed, a drill, one that did not run, and a baseline to compare with."""
    root = tmp_path_factory.mktemp("page with a space")
    healthy = observe(write_run(root / "healthy"))
    (root / "healthy" / OVERLAP_PICTURE).write_text(PICTURE)
    broken = observe(write_run(root / "broken", lambda reports: reports[1]["chunks"].append(chunk(3))))
    gates = ("exit-codes", "calls", "account")
    results = []
    for name, seen in (("healthy", healthy), ("broken", broken)):
        findings = tuple(evaluate(gate, seen) for gate in gates)
        results.append(CaseResult(_case(name), root / name, findings, metrics(seen, findings)))
    slower = Finding("baseline.period_p50_ms", Verdict.WARN, "period_p50_ms: 1.40 times the baseline", 1.4, 1.25)
    results[0] = CaseResult(results[0].case, root / "healthy", (*results[0].findings, slower), results[0].metrics)
    cause = Cause(
        1, "it said <script>alert(1)</script>", "TP-6101", 70, tail=("the last & line",), next="tpctl triage X"
    )
    results[1] = CaseResult(results[1].case, root / "broken", results[1].findings, results[1].metrics, cause)
    figures = {"first_failure_ms": 12.0, "gone_ms": 480.0, "code": "TP-6001", "fm": "FM-30", "blame": "rank 1"}
    results.append(CaseResult(_case("OM-11"), root / "OM-11", (Finding("injected", Verdict.PASS, "planted"),), figures))
    results.append(CaseResult(_case("late"), root / "late", (Finding("run", Verdict.UNCHECKED, "not run"),), {}))
    envelope = envelope_of(Matrix("a matrix", "m.toml", tuple(r.case for r in results)), results, root, HOST).to_dict()
    path = root / "report.html"
    path.write_text(render(envelope, path), encoding="utf-8")
    return path


def _case(name: str) -> Any:
    from dataclasses import replace

    return replace(CASE, id=name, title=f"the case {name}")


def test_the_verdict_comes_first_and_what_failed_before_what_passed(page: Path) -> None:
    text = page.read_text()
    places = [
        text.index(words) for words in ('class="card banner FAIL"', 'id="attention"', 'id="cases"', 'id="evidence"')
    ]
    assert places == sorted(places)
    assert "1 FAIL, 1 PASS, 1 UNCHECKED, 1 WARN of 4 cases" in text
    attention = text[places[1] : places[2]]
    assert attention.index("broken") < attention.index("the last &amp; line") < attention.index("tpctl triage X")
    assert "late" in attention
    assert "OM-11" not in attention


def test_words_of_a_job_are_words_alone(page: Path) -> None:
    text = page.read_text()
    assert "<script" not in text
    assert "it said &lt;script&gt;alert(1)" in text


def test_it_is_one_file_and_its_links_lead_to_what_the_cases_left(page: Path) -> None:
    text = page.read_text()
    assert not fetched(text)
    assert fetched('<img src="x.png"><link href="y.css">') == ["<img src=x.png>", "<link href=y.css>"]
    assert 'href="healthy/ranks/rank1.json"' in text
    assert "data:image/svg+xml;base64," in text


def test_figures_that_are_not_there_leave_a_gap_and_no_zero(page: Path) -> None:
    text = page.read_text()
    row = text[text.index('<a href="#case-4">') :]
    row = row[: row.index("</tr>")]
    assert row.count('"></td>') >= 6
    assert "1.40 times the baseline" in text


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [500, 1280], ids=["phone", "desk"])
def test_a_browser_shows_it(page: Path, width: int, scheme: str, tmp_path: Path) -> None:
    """Nothing is wider than the window, every picture loads, every bar has a length, and the scheme is obeyed."""
    asked = page.with_name(f"asked-{width}-{scheme}.html")
    asked.write_text(page.read_text().replace("</head>", ASK + "</head>"))
    shot = tmp_path / f"bringup-{width}-{scheme}.png"
    scheme_flag = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    dom = browse(tmp_path, scheme_flag, f"--window-size={width},900", "--dump-dom", asked.as_uri())
    said = json.loads(unescape(dom.split('<pre id="asked">')[1].split("</pre>")[0]))
    assert said["content"] <= said["width"]
    assert said["broken"] == 0
    assert said["top"] < 200
    assert len(said["bars"]) >= 8
    assert min(said["bars"]) >= 2
    light = sum(int(part) for part in said["ground"].removeprefix("rgb(").rstrip(")").split(",")) > 384
    assert light == (scheme == "light")
    browse(tmp_path, scheme_flag, f"--window-size={width},2400", f"--screenshot={shot}", page.as_uri())
    assert shot.read_bytes().startswith(b"\x89PNG")
    if kept := os.environ.get("TPCTL_ARTEFACTS"):
        Path(kept).mkdir(parents=True, exist_ok=True)
        shutil.copy(shot, kept)


def browse(tmp_path: Path, *args: str) -> str:
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
