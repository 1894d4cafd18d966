"""Books, without running anything: expectations, checklists, records, runbooks, the crosswalk, and every link."""

from __future__ import annotations

import copy
import re
import shlex
import tomllib
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from tpctl.books import checklist, crosswalk, record, runbook
from tpctl.books.cause import CAUSED
from tpctl.books.execute import Ran, narrowed
from tpctl.books.expect import MISSING, Expect, at
from tpctl.books.perform import judge as judge_block
from tpctl.books.place import RUNBOOKS, BookError
from tpctl.books.symbol import resolve
from tpctl.books.walk import Answer, Walked, judge
from tpctl.drill import table
from tpctl.failuremodes import CODES, FAILURE_MODES, LINK_LOST, has_runbook, runbook_id
from tpctl.lazy import MODULES
from tpctl.schemas import load_schema
from tpctl.triage import Triage
from tpctl.verdict import Verdict

ROOT = Path(__file__).parents[2]
CHECKLISTS = {one.id: one for one in checklist.load_all()}
RUNBOOK_PAGES = {one.id: one for one in runbook.load_all()}
DRILLS = {drill.id for drill in table.load()}
TOPICS = (
    *("framing", "deadlocks", "drain", "backpressure", "replay", "determinism", "kv-cache"),
    *("p0", "pp", "flags", "progress", "release"),
)
FAILURES = (
    *("hang-at-start", "hang-mid-stream", "drift", "rank-lost", "rank-frozen", "parity-mismatch"),
    *("kv-digest-mismatch", "drain-stuck", "overlap-collapsed", "slow-period", "out-of-memory", "sink-full"),
    *("compile-regression", "link-lost", "restore", "wire-upgrade"),
)
CARDS = ("cards/collectives", "cards/dynamo", "cards/funcol", "cards/groups")
DOCUMENT = {"data": {"cases": [{"id": "a.b", "n": 3, "ok": True}, {"id": "c/d", "n": None}]}, "verdict": "PASS"}
ITEM = CHECKLISTS["deadlocks"].items[0]


def items() -> list[tuple[str, checklist.Item]]:
    return [(one.id, item) for one in CHECKLISTS.values() for item in one.items]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("/verdict", "PASS"),
        ("/data/cases/0/n", 3),
        ("/data/cases/id=a.b/n", 3),
        ("/data/cases/id=c~1d/n", None),
        ("/data/cases/2", MISSING),
        ("/data/cases/id=x", MISSING),
        ("/verdict/0", MISSING),
        ("/nothing", MISSING),
    ],
)
def test_what_stands_at_a_path(path: str, value: object) -> None:
    assert at(DOCUMENT, path) == value or at(DOCUMENT, path) is value


@pytest.mark.parametrize(
    ("expect", "code", "met"),
    [
        (Expect(), 0, True),
        (Expect(), 3, False),
        (Expect((0, 5)), 5, True),
        (Expect(path="/verdict", value="PASS"), 0, True),
        (Expect(path="/verdict", value="PASS"), 3, False),
        (Expect(path="/verdict", value="FAIL"), 0, False),
        (Expect(path="/nowhere", value=None), 0, False),
        (Expect(path="/data/cases/0/n", least=3, most=3), 0, True),
        (Expect(path="/data/cases/0/n", least=3.5), 0, False),
        (Expect(path="/data/cases/0/n", most=2.5), 0, False),
        (Expect(path="/data/cases/0/ok", least=0), 0, False),
        (Expect(path="/data/cases/1/n", least=0), 0, False),
    ],
)
def test_an_expectation_is_met_or_not(expect: Expect, code: int, met: bool) -> None:
    assert expect.judge(code, DOCUMENT)[0] is met
    assert not expect.judge(9, DOCUMENT)[0]
    assert expect.path is None or not expect.judge(code, None)[0]


def test_an_answer_that_did_not_come_in_time_is_unknown() -> None:
    ran = Ran("tpctl env", 0, '{"verdict": "PASS"}', "", 1.0, late=True)
    assert judge(ITEM, ran).verdict is Verdict.UNKNOWN
    block = RUNBOOK_PAGES["rank-lost"].blocks[0]
    assert judge_block("rank-lost", block, ran, as_json=True).verdict is Verdict.UNKNOWN
    assert judge(ITEM, replace(ran, late=False)).verdict is Verdict.FAIL


def test_there_is_a_checklist_for_each_topic_and_a_page_for_each_failure() -> None:
    assert sorted(CHECKLISTS) == sorted(TOPICS)
    assert sorted(RUNBOOK_PAGES) == sorted([*FAILURES, *CARDS])


@pytest.mark.parametrize("name", TOPICS)
def test_a_checklist_is_one_page(name: str) -> None:
    lines = checklist.page(CHECKLISTS[name])
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 80
    assert CHECKLISTS[name].text.count(b"[[item]]") == sum(bool(re.match(r"\d\. \[ \] ", line)) for line in lines)


@pytest.mark.parametrize(("name", "item"), items(), ids=lambda value: getattr(value, "id", value))
def test_an_item_names_what_exists(name: str, item: checklist.Item) -> None:
    assert item.argv[1] in MODULES
    assert item.on_fail in FAILURES
    assert has_runbook(item.on_fail)
    assert item.why.endswith(".")
    assert item.text.endswith(".")
    if item.argv[1] == "drill" and item.argv[2] != table.STANDARD_NAME:
        assert item.drill == item.argv[2]  # the guard that the item looks at is the one that is switched off
    if not item.drill.startswith("--"):
        assert item.drill in DRILLS | CAUSED


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('mode = "READ-DO"', 'mode = "READ"', "mode is 'READ'"),
        ('id = "deadlocks"', 'id = "locks"', "its id is 'locks'"),
        ('topic = "', 'topics = "', "misses the key|misses 'topic'"),
        ("forbidden = [", "x = [", "misses 'forbidden'"),
        ('id = "flag-parity"', 'id = "call-count"', "two items have one id"),
        ('command = "tpctl drill OM-05.last -o json"', 'command = "rm -rf x"', "every item is a tpctl command"),
        ('tripwire = "env parity"', 'tripwires = "env parity"', "misses 'tripwire'"),
        ('value = "TP-3301"', 'values = "TP-3301"', "unknown key 'expect.values'"),
        ('path = "/data/drills/0/code", value = "TP-3301"', 'path = "/data"', "expect.path needs a value"),
        ("[[item]]", "[item]", "cannot be read"),
    ],
)
def test_a_checklist_that_contradicts_itself_is_refused(old: str, new: str, said: str) -> None:
    text = CHECKLISTS["deadlocks"].text.decode()
    assert text.count(old) >= 1
    with pytest.raises(BookError, match=said):
        checklist.parse("deadlocks", text.replace(old, new, 1).encode())


def test_too_few_items_are_refused() -> None:
    text = CHECKLISTS["deadlocks"].text.decode()
    parts = text.split("[[item]]")
    with pytest.raises(BookError, match="has 4 items; a page holds 5 to 9"):
        checklist.parse("deadlocks", "[[item]]".join(parts[:5]).encode())


def test_a_name_that_is_nearly_right_is_suggested() -> None:
    with pytest.raises(BookError, match="did you mean 'deadlocks'"):
        checklist.load("deadlock")
    with pytest.raises(BookError, match="did you mean 'rank-lost'"):
        runbook.load("rank-lst")


def test_a_record_shows_every_later_change() -> None:
    answers = tuple(
        judge(item, Ran(item.command, 0, '{"verdict": "PASS"}', "", 0.5)) for item in CHECKLISTS["deadlocks"].items
    )
    walked = Walked(CHECKLISTS["deadlocks"], (*answers, Answer(ITEM, Verdict.UNCHECKED, "not run")), "then", "now")
    sealed = walked.sealed()
    jsonschema.Draft202012Validator(load_schema("checklist-record")).validate(sealed)
    assert walked.verdict is Verdict.FAIL
    assert (walked.coverage.checked, walked.coverage.expected) == (6, 7)
    assert record.broken(sealed) is None
    assert sealed["checklist_sha256"] == record.digest(CHECKLISTS["deadlocks"].text)
    for change in (
        lambda data: data.update(verdict="PASS"),
        lambda data: data["who"].update(user="somebody else"),
        lambda data: data["item"][1].update(verdict="PASS"),
        lambda data: data["item"].pop(),
        lambda data: data["item"].reverse(),
        lambda data: data.update(sha256="0" * 64),
    ):
        altered = copy.deepcopy(sealed)
        change(altered)
        assert record.broken(altered) is not None


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    sealed = record.seal({"checklist": "x", "budget": 1.5}, [{"id": "a", "wall_s": 0.125, "found": True}])
    record.write(sealed, tmp_path / "x.toml")
    assert record.broken(record.read(tmp_path / "x.toml")) is None
    (tmp_path / "x.toml").write_text('schema = "other"\n')
    with pytest.raises(BookError, match=r"not tpctl\.checklist-record"):
        record.read(tmp_path / "x.toml")


def test_one_answer_is_cut_out_of_many() -> None:
    finding = {"id": "f", "verdict": "FAIL", "where": "OM-02"}
    rows = [
        {"id": name, "verdict": verdict, "findings": [{"verdict": verdict}]}
        for name, verdict in (("OM-01", "PASS"), ("OM-02", "FAIL"), ("OM-21.a", "PASS"), ("OM-21.b", "SKIP"))
    ]
    document = {"verdict": "FAIL", "data": {"drills": rows}, "findings": [finding], "next": ["x"]}
    ran = Ran("tpctl drill OM-01 OM-02 OM-21", 3, str(document).replace("'", '"'), "", 9.0)
    good, bad, many, none = (narrowed(ran, name, f"tpctl drill {name}") for name in ("OM-01", "OM-02", "OM-21", "OM-9"))
    assert (good.code, good.document["verdict"], good.document["findings"]) == (0, "PASS", [])
    assert (bad.code, bad.document["verdict"], len(bad.document["findings"])) == (3, "FAIL", 1)
    assert [row["id"] for row in many.document["data"]["drills"]] == ["OM-21.a", "OM-21.b"]
    assert many.document["coverage"] == {"checked": 1, "expected": 1}
    assert (none.code, none.document) == (3, None)
    assert good.answered_by == ran.command


@pytest.mark.parametrize("name", [*FAILURES, *CARDS])
def test_a_page_links_to_what_exists(name: str) -> None:
    one = RUNBOOK_PAGES[name]
    assert runbook.dead_links(one, set(RUNBOOK_PAGES), set(CHECKLISTS), RUNBOOKS) == []
    prose = re.sub(r"```.*?```", "", one.text, flags=re.DOTALL)
    assert max(map(len, prose.splitlines())) <= 80
    assert len(one.text.splitlines()) <= 110
    for block in one.blocks:
        words = shlex.split(block.command)
        assert words[0] != "tpctl" or words[1] in MODULES, block
        assert set(re.findall(r"\{(\w+)\}", block.command)) <= {"job", "run", "config"}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("## Impact", "## Effect", "its sections are"),
        ("```sh name=who", "```sh", "must begin with: sh name=NAME"),
        ("```sh name=who", "```python name=who", "must begin with: sh name=NAME"),
        ("```sh name=last-acts", "```sh name=who", "two blocks are named 'who'"),
        ("name=who expect=3", "name=who expects=3", "the unknown word 'expects'"),
        ("name=who expect=3", "name=who expect=three", "no list of exit codes"),
        ("tpctl parity-check\n", "tpctl parity-check\ntpctl env\n", "holds 2 commands"),
        ("tpctl parity-check\n", "tpctl parity-check | head\n", "needs a shell for '|'"),
        ('failure_modes = ["FM-40"]', 'modes = ["FM-40"]', "unknown key 'modes'"),
    ],
)
def test_a_runbook_that_breaks_the_rules_is_refused(old: str, new: str, said: str) -> None:
    text = RUNBOOK_PAGES["rank-lost"].text
    assert old in text
    with pytest.raises(BookError, match=re.escape(said)):
        runbook.parse("rank-lost", text.replace(old, new, 1))


def test_links_agree_both_ways() -> None:
    """From every failure mode and code to its page, and from every page back."""
    for fm in FAILURE_MODES:
        name = runbook_id(fm)
        assert name in FAILURES, fm
        assert fm in RUNBOOK_PAGES[name].failure_modes
    for code, group in CODES.items():
        assert group.runbook in FAILURES, code
        page = RUNBOOK_PAGES[str(group.runbook)]
        assert group.fm in page.failure_modes or code in page.codes or any(code.startswith(c) for c in page.codes)
    for page in RUNBOOK_PAGES.values():
        assert [fm for fm in page.failure_modes if runbook_id(fm) != page.id] == []
        assert [code for code in page.codes if runbook_id(None, code) != page.id] == []
    assert LINK_LOST in FAILURES
    lost = Triage(Verdict.FAIL, "lost", "host 1 has said nothing", fm="FM-40", source="referee")
    assert (lost.runbook, replace(lost, triggers=(1,)).runbook) == (LINK_LOST, "rank-lost")


def test_every_runbook_that_code_or_documents_name_exists() -> None:
    named = []
    for path in [
        *ROOT.glob("engine/**/*.py"),
        *ROOT.glob("tpctl/**/*.py"),
        *ROOT.glob("docs/**/*.md"),
        ROOT / "README.md",
    ]:
        named += [(path.name, *match) for match in runbook.LINK.findall(path.read_text(encoding="utf-8"))]
    assert named
    for where, kind, name in named:
        assert name in (RUNBOOK_PAGES if kind == "runbook" else CHECKLISTS), (where, name)


def test_a_symbol_is_resolved_to_where_it_stands_now() -> None:
    place = resolve("tpctl.books.walk:Walked.sealed")
    line = (ROOT / place.file).read_text().splitlines()[place.line - 1]
    assert line == "    def sealed(self) -> dict[str, Any]:"
    assert resolve("tpctl.drill.table:STANDARD").line > 1
    for wrong in ("tpctl.books.walk:Walked.gone", "tpctl.books.walk:gone", "tpctl.gone:x", "os:path"):
        with pytest.raises(BookError, match=r"there is no module|has no"):
            resolve(wrong)


@pytest.mark.parametrize("row", crosswalk.load(), ids=lambda row: row.title)
def test_a_row_of_the_crosswalk_points_to_what_exists(row: crosswalk.Row) -> None:
    assert row.places()
    assert row.checklist in CHECKLISTS
    assert row.runbook in RUNBOOK_PAGES
    assert all(any(one == drill or one.startswith(f"{drill}.") for one in DRILLS) for drill in row.drills)
    assert row.drills
    assert shlex.split(row.command)[1] in MODULES


def test_the_crosswalk_is_complete() -> None:
    """Against the document itself, where it lies beside the checkout; against its known sizes everywhere."""
    rows = crosswalk.load()
    count = {section: sum(row.section == section for row in rows) for section in crosswalk.SECTIONS}
    assert count == {"scaffold": 11, "break-it": 4, "p0": 6, "tripwire": 1, "topics": 7, "cards": 4, "todo": 4}
    document = ROOT.parent / "shared" / "crosswalk.md"
    if not document.is_file():
        pytest.skip("the document that was mapped is not beside this checkout")
    text = document.read_text(encoding="utf-8")
    titles = re.findall(r"^\| \*\*(.+?)\*\*", text, re.MULTILINE)
    titles += re.findall(r"^\d\) \*\*(.+?)\*\*", text, re.MULTILINE)
    titles += re.findall(r"^- \*\*(.+?)\*\*:", text.partition("P0 checklist")[2].partition("Optional")[0], re.MULTILINE)
    assert len(titles) == 11 + 4 + 6
    ours = [_plain(row.title) for row in rows]
    for title in titles:
        plain = _plain(title.removesuffix(" (PP)"))
        assert any(own.startswith(plain) or plain.startswith(own) for own in ours), title


def _plain(title: str) -> str:
    return re.sub(r"[^a-z0-9/ ]", "", title.lower().replace("→", "to").replace("’", "")).replace("  ", " ").strip()


def test_the_wheel_holds_what_the_pages_need() -> None:
    """The patterns of package data, against the files; the built wheel is looked into elsewhere."""
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["tpctl"]
    packed = {path for pattern in data for path in (ROOT / "tpctl").glob(pattern)}
    for folder in ("checklists", "runbooks"):
        link = ROOT / "tpctl" / "books" / folder
        assert link.resolve() == ROOT / folder
        assert {path for path in link.rglob("*") if path.is_file()} <= packed
