"""The arrows between modules run one way, and what must stay free of torch does."""

import ast
import graphlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Rooms from left to right; a module imports from its own room or from one to its left.
ROOMS = (
    ("errors",),
    (
        "config",
        "plan",
        "timeline",
        "control",
        "lifecycle",
        "blackbox",
        "log",
        "records",
        "report",
        "measures",
        "memory",
        "metrics",
        "process",
        "sealed",
        "seeded_tokenizer",
    ),
    ("wire",),
    ("comm",),
    ("referee",),
    # `assets` makes tiny weights with the modules of model and codecs, and the loader asks it for them.
    ("model", "codecs", "sinks", "sources", "tripwires", "seeded", "assets", "recorder", "sampling", "evidence"),
    ("overlap", "streams", "watchdog", "drain", "materials"),
    ("stage0", "stage1"),
    ("rank", "record", "warmup", "failures"),
    ("leader", "follower", "pipeline", "meshleader", "faults", "referee"),
    ("worker", "nursery", "replay"),
)
ORDER = {name: place for place, names in enumerate(ROOMS) for name in names}
FIRST_GROUP = (
    "errors",
    "config",
    "plan",
    "timeline",
    "control",
    "lifecycle",
    "blackbox",
    "log",
    "records",
    "report",
    "measures",
    "process",
    "sealed",
)
TPCTL_MAY_IMPORT = {*FIRST_GROUP, "wire.header", "wire.problem", "referee", "model.sharding"}
TORCH_FREE = (
    "tpctl",
    "tpctl.app",
    "engine",
    *(f"engine.{name}" for name in FIRST_GROUP),
    "engine.wire.header",
    "engine.referee",
    "engine.referee.judge",
    "engine.model.sharding",
)


def imports_of(path: Path, *, loading: bool = False):
    """Dotted modules that a file imports; `loading` leaves out those inside functions and under TYPE_CHECKING."""
    package = path.relative_to(ROOT).with_suffix("").parts
    todo = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level]) + "." if node.level else ""
            module = (base + (node.module or "")).rstrip(".")
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        else:
            lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
                isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            )
            if not (loading and lazy):
                todo.extend(ast.iter_child_nodes(node))


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def room(dotted: str) -> str | None:
    """The room of an engine module; None for other modules and for names that are no module (`engine.__version__`)."""
    parts = dotted.split(".")
    if parts[0] != "engine" or len(parts) < 2:
        return None
    place = ROOT / "engine" / parts[1]
    return parts[1] if place.is_dir() or place.with_suffix(".py").exists() else None


@pytest.mark.parametrize("path", sources("engine"), ids=lambda p: str(p.relative_to(ROOT)))
def test_engine_modules_import_from_their_left_only(path):
    own = path.relative_to(ROOT / "engine").with_suffix("").parts[0]
    if own == "__init__":
        assert not [name for name in imports_of(path) if room(name)]
        return
    assert own in ORDER, f"{own} has no place in the order: give it one here"
    wrong = sorted(
        {name for name in imports_of(path) if room(name) in ORDER and ORDER[room(name)] > ORDER[own]}
        | {name for name in imports_of(path) if name.startswith("tpctl")}
    )
    assert not wrong, f"{own} reaches to its right: {wrong}"


def graph_of(package: str, *, loading: bool) -> dict[str, set[str]]:
    """The modules of a package, and which of them each imports."""
    files = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in sources(package)}
    return {n: {i for i in imports_of(p, loading=loading) if i in files and i != n} for n, p in files.items()}


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """Some circle of the graph, from a name round to the same name; empty if there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def rooms_of(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The graph of the packages and modules that stand directly in the package."""

    def inner(dotted: str) -> str:
        return ".".join(dotted.split(".")[:2])

    rooms: dict[str, set[str]] = {}
    for name, imported in graph.items():
        rooms.setdefault(inner(name), set()).update(
            inner(other) for other in imported if "." in other and inner(other) != inner(name)
        )
    return rooms


def test_no_circle_while_modules_load():
    """Rooms allow neighbours to import each other; modules must not do it in a circle."""
    assert not circle_in(graph_of("engine", loading=True))


def test_no_circle_in_tpctl_between_modules_or_packages():
    """Nor in imports inside functions or for types alone: a reader goes in a circle there too."""
    graph = graph_of("tpctl", loading=False)
    assert not circle_in(graph)
    assert not circle_in(rooms_of(graph))


@pytest.mark.parametrize(
    ("module", "imported", "circle"),
    [
        ("launch/local.py", "from tpctl.matrix.observation import Observation", "module"),
        ("launch/environment.py", "def late():\n    import tpctl.matrix.case", "package"),
    ],
)
def test_the_checker_sees_a_circle(module, imported, circle, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "tpctl", tmp_path / "tpctl", ignore=shutil.ignore_patterns("__pycache__", "books"))
    with (tmp_path / "tpctl" / module).open("a") as more:
        more.write(f"\n\n{imported}\n")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    graph = graph_of("tpctl", loading=False)
    assert bool(circle_in(graph)) == (circle == "module")
    assert {"tpctl.launch", "tpctl.matrix"} <= set(circle_in(rooms_of(graph)))


def test_the_stages_never_import_each_other():
    for own, other in (("stage0", "stage1"), ("stage1", "stage0")):
        path = ROOT / "engine" / f"{own}.py"
        if path.exists():
            assert not [name for name in imports_of(path) if room(name) == other]


@pytest.mark.parametrize("path", sources("tpctl"), ids=lambda p: str(p.relative_to(ROOT)))
def test_tpctl_imports_only_what_is_free_of_torch(path):
    wrong = set()
    for name in imports_of(path):
        if name == "torch" or name.startswith("torch."):
            wrong.add(name)
        inner = name.removeprefix("engine.")
        if room(name) and not any(inner == ok or inner.startswith(ok + ".") for ok in TPCTL_MAY_IMPORT):
            wrong.add(name)
    assert wrong <= {"engine.wire", "engine.model"}, sorted(
        wrong
    )  # `from engine.wire import header` names the package on its way


def test_the_checker_sees_an_arrow_that_runs_the_wrong_way(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "engine" / "plan.py"
    path.parent.mkdir()
    path.write_text("def lazily():\n    from engine.wire import frame\n")
    (tmp_path / "engine" / "wire").mkdir()
    assert "engine.wire.frame" in set(imports_of(path))
    assert "engine.wire.frame" not in set(imports_of(path, loading=True))
    with pytest.raises(AssertionError, match="reaches to its right"):
        test_engine_modules_import_from_their_left_only(path)


@pytest.mark.parametrize("module", TORCH_FREE)
def test_these_modules_load_without_heavy_libraries(module):
    if module.startswith("engine.") and not any(
        (ROOT / (module.replace(".", "/") + end)).exists() for end in (".py", "/__init__.py")
    ):
        pytest.skip(f"{module} is not written yet")
    heavy = "{'torch', 'transformers', 'diffusers', 'av', 'PIL', 'numpy'}"
    code = f"import sys, {module}; print(sorted({{name.split('.')[0] for name in sys.modules}} & {heavy}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
