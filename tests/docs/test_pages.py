"""Generated pages are fresh, links lead somewhere, and every command of every page runs as it is written.

A block of `sh` runs line by line in one shell, in the order of the page, in an empty directory with the checkout's
`.venv/bin`. Where it cannot run here, the line above it says which test runs it instead: `<!-- run by tests/... -->`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.docs.generate import ROOT, pages

PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
ELSEWHERE = re.compile(r"<!-- run by (?P<test>tests/\S+) -->")


def blocks(page: Path) -> Iterator[tuple[str, str | None]]:
    """The `sh` blocks of a page, each with the test that runs it elsewhere, if one does."""
    before: Token | None = None
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "fence" and token.info.split()[:1] == ["sh"]:
            said = ELSEWHERE.search(before.content) if before is not None and before.type == "html_block" else None
            yield token.content, said["test"] if said else None
        before = token


@pytest.mark.parametrize("page", list(pages()), ids=lambda path: path.name)
def test_a_generated_page_is_fresh(page: Path) -> None:
    assert page.read_text(encoding="utf-8") == pages()[page], "stale: make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link]
    paths = re.findall(r"`((?:engine|tpctl|tests|docs|benchmarks|runbooks|checklists)/[\w./-]*)`", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [path for path in paths if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_what_is_run_elsewhere_is_run_there(page: Path) -> None:
    for _, test in blocks(page):
        if test is not None:
            file, _, name = test.partition("::")
            source = (ROOT / file).read_text(encoding="utf-8")
            assert f"def {name}(" in source


def test_the_two_commands_are_what_they_say() -> None:
    """`make bringup` is `tpctl bringup`, and `make test` is pytest, after the same set-up; both run in CI."""
    shown = {
        target: subprocess.run(
            ["make", "-n", "--no-print-directory", f"PYTHON={sys.executable}", target],
            cwd=ROOT,
            env={"PATH": os.environ["PATH"]},  # a make around us would speak through its variables
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        for target in ("bringup", "test", "check")
    }
    assert shown["bringup"][-1] == ".venv/bin/tpctl bringup"
    assert shown["test"][-1] == shown["check"][-1] == ".venv/bin/python -m pytest"


def test_the_commands_of_the_pages_run(tmp_path: Path) -> None:
    """One shell a page, so that what one block starts the next one finds."""
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    ran = 0
    for page in PAGES:
        lines = [text for text, elsewhere in blocks(page) if elsewhere is None]
        if not lines:
            continue
        script = "set -euo pipefail\n" + "".join(lines)
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=tmp_path,
            env=environment(tmp_path),
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, f"{page.name}:\n{script}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        ran += len(lines)
    assert ran


def environment(home: Path) -> dict[str, str]:
    """An operator's shell: a home of its own, this checkout's code."""
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TPCTL_STATE_DIR": str(home / "state"),
    }
