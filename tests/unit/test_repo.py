"""The repository: what its documents promise exists, modules say what they are, nothing points at one machine."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = {".py", ".md", ".toml", ".txt", ".cfg", ".json", ".yml", ".yaml", ".sh", ""}


def whole(text: str) -> str:
    """The text without its `~`: they keep this file free of what it forbids."""
    return text.replace("~", "")


PATTERNS = {
    "a home or working directory of one machine": r"(?<![\w.])/(?:h~ome/\w|U~sers/\w|w~ork/|r~oot/)",
    "a package registry's host": r"(?:py~pi\.org|python~hosted\.org|npm~js\.org|deb~ian\.org)",
    "a model hub's address": r"https?://(?:www\.)?hugging~face\.co",
    "a private key": r"BEGIN [A-Z ]*PRI~VATE KEY",
    "an unfinished thought": r"\b(?:TO~DO|FIX~ME|X~XX)\b",
    "a merge left half-way": r"^(?:<{7} |>{7} )",
}
FORBIDDEN = {what: re.compile(whole(pattern), re.MULTILINE) for what, pattern in PATTERNS.items()}


def tracked() -> list[Path]:
    """Files under version control, or all but what .gitignore would name where there is no git."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    if listed.returncode == 0 and listed.stdout:
        return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    skipped = {".venv", ".git", "runs", "build", "dist", "__pycache__"}
    return [p for p in ROOT.rglob("*") if p.is_file() and not skipped & set(p.relative_to(ROOT).parts)]


def modules() -> list[Path]:
    return sorted(p for package in ("engine", "tpctl", "benchmarks") for p in (ROOT / package).rglob("*.py"))


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_says_what_it_is(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if not tree.body:
        return  # an empty __init__.py
    docstring = ast.get_docstring(tree)
    assert docstring, f"{path} has no module docstring"
    assert len(docstring) >= 10


def test_there_is_something_to_look_at() -> None:
    names = {str(p.relative_to(ROOT)) for p in modules()}
    assert {"engine/worker.py", "engine/sinks/base.py", "tpctl/app.py", "benchmarks/measure.py"} <= names


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_holds(what: str) -> None:
    found = []
    for path in tracked():
        if path.suffix not in TEXT:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}: {match.group()}"
            for match in FORBIDDEN[what].finditer(text)
        ]
    assert not found, f"{what}:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("a home or working directory of one machine", "see /h~ome/jane/x"),
        ("a package registry's host", "https://py~pi.org/simple"),
        ("a model hub's address", "https://hugging~face.co/x"),
        ("a private key", "-----BEGIN RSA PRI~VATE KEY-----"),
        ("an unfinished thought", "# TO~DO: later"),
        ("a merge left half-way", "a\n<<<~<<<< HEAD\n"),
    ],
)
def test_the_patterns_find_what_they_are_for(what: str, text: str) -> None:
    assert FORBIDDEN[what].search(whole(text))


def test_every_make_command_of_the_documents_is_a_target() -> None:
    readme = ROOT / "README.md"
    assert readme.exists(), "README.md is missing"
    targets = make_targets()
    documents = [readme, *ROOT.glob("runbooks/*.md"), *ROOT.glob("docs/**/*.md")]
    for document in documents:
        for command in re.findall(r"(?:^|`|\$ )make ([a-z][a-z-]*)", document.read_text(), re.MULTILINE):
            assert command in targets, f"{document.name} says 'make {command}', which is no target"
    assert {"bringup", "test"} <= set(re.findall(r"make ([a-z]+)", readme.read_text()))


def test_every_tpctl_command_of_the_documents_exists() -> None:
    from tpctl.lazy import COMMANDS

    known = {name for name, *_ in COMMANDS}
    for document in [ROOT / "README.md", *ROOT.glob("runbooks/*.md"), *ROOT.glob("checklists/*.toml")]:
        for command in re.findall(r"(?:^|`|\$ )tpctl ([a-z][a-z-]*)", document.read_text(), re.MULTILINE):
            assert command in known, f"{document.name} says 'tpctl {command}', which is no command"


def test_every_phony_target_is_there_and_the_documented_ones_set_up_first() -> None:
    text = (ROOT / "Makefile").read_text()
    phony = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE).group(1).split())  # type: ignore[union-attr]
    assert phony <= make_targets()
    for target in ("bringup", "test", "check", "bench"):
        assert re.search(rf"^{target}: .*\bsetup\b", text, re.MULTILINE), f"make {target} does not set up first"


def test_the_version_is_the_same_everywhere() -> None:
    import engine
    import tpctl

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert engine.__version__ == tpctl.__version__ == project["version"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_dependency_has_a_tested_pin() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {
        re.split(r"==", line)[0].strip().lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    }
    wanted = [re.split(r"[<>=!~\[; ]", spec)[0].lower() for spec in project["dependencies"]]
    assert sorted(set(wanted) - pins) == []


def test_ci_runs_what_a_developer_runs() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert re.search(r"^make check$", script.read_text(), re.MULTILINE)
