"""Bundles without a job: what is taken out of texts, how files are read, and archives that nobody should trust."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import tarfile
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from tpctl.bundle import archive
from tpctl.bundle.manifest import Item, Manifest, Status
from tpctl.bundle.reading import read_bounded
from tpctl.bundle.redact import Redactor, UnclearError, prompts_of
from tpctl.errors import BundleError
from tpctl.verdict import Verdict

RUN = {"label": "0", "lives": {"0": "gone"}}


def made(*items: Item, runs: tuple = (RUN,)) -> Manifest:
    return Manifest("job", "fox", "h", "2026-01-01T00:00:00+00:00", True, runs, items)


def item(name: str = "job/job.json", raw: bytes | None = b"{}", **more: object) -> Item:
    return Item(name, Status.collected if raw is not None else Status.missing, raw, **more)


# Words that must not leave ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "HF_TOKEN=abcd1234efgh",
        'password: "hunter2hunter2"',
        '{"api_key": "abcd1234efgh"}',
        "Authorization: Bearer abcd1234efgh",
        "pulling from https://user:abcd1234efgh@mirror/x",
        "the key hf_abcd1234efghabcd1234 was refused",
        "-----BEGIN RSA PRIV" + "ATE KEY-----\nabcd1234efgh\n-----END RSA-----",
        "it said s3same-0pen-now",
    ],
)
def test_a_secret_never_stays(line: str) -> None:
    count: Counter[str] = Counter()
    text = Redactor([{"MY_SECRET": "s3same-0pen-now"}]).text(line, count)
    for word in ("abcd1234efgh", "hunter2", "s3same"):
        assert word not in text
    assert count["secret"] >= 1
    if line.startswith("{"):
        json.loads(text)


@pytest.mark.parametrize(
    "line",
    [
        "tokens_per_frame=12 tokens: 7777 token=4096",
        '{"max_tokens": 4096, "token": 50000, "secret": null, "password": false}',
        "a key=value",
    ],
)
def test_ordinary_words_stay(line: str) -> None:
    assert Redactor([{"PATH_TOKEN": "/", "X_SECRET": "abc"}]).text(line, Counter()) == line


def test_home_paths_are_shortened_and_only_they() -> None:
    redactor = Redactor(home="/h/jane")
    count: Counter[str] = Counter()
    assert redactor.text('"/h/jane/x" /h/jane-2/x /h/jane', count) == '"~/x" /h/jane-2/x ~'
    assert +count == {"home": 2}


def test_prompts_leave_only_when_they_may() -> None:
    prompt = 'a "red" fox in Łódź'
    toml = f"[run]\nprompt = {json.dumps(prompt)}\nchunks = 3\n".encode()
    assert prompts_of(toml) == {prompt}
    assert prompts_of(b"[[event]]\nat_chunk = 0\nprompt = 'abc'\n") == {"abc"}
    assert prompts_of(b"\xff[") == set()
    keeps, drops = Redactor(), Redactor(prompts={prompt, "fox"})
    assert keeps.file("config.toml", toml, Counter()) == toml
    for name, raw in {
        "config.toml": toml,
        "rank0.json": json.dumps({"parity": {"config.run.prompt": json.dumps(prompt)}, "note": prompt}).encode(),
        "rank0.chunks.jsonl": (json.dumps({"prompt": "fox"}) + "\n" + json.dumps({"a": [prompt]}) + "\n").encode(),
        "stderr.log": f"now: {prompt}\nnow: {prompt!r}\n".encode(),
    }.items():
        text = drops.file(name, raw, Counter()).decode()
        assert "[prompt]" in text
        assert "red" not in text, name
        assert '"fox"' not in text, name  # too short to be looked for, and in its field all the same
    assert tomllib.loads(drops.file("config.toml", toml, Counter()).decode())["run"] == {
        "prompt": "[prompt]",
        "chunks": 3,
    }
    for name, raw in {"config.toml": b"prompt = ", "rank0.json": b"{", "r.jsonl": b'{"a": 1}\n{"pro'}.items():
        with pytest.raises(UnclearError):
            drops.file(name, raw, Counter())


@pytest.mark.parametrize(
    "unit", ["x", "a_", "://", "token ", "secret=", "-----BEGIN A PRIV" + "ATE KEY-----", "Bearer "]
)
def test_long_lines_cost_no_more_than_their_length(unit: str) -> None:
    """A test that is quadratic in the megabyte would run into the limit of every test."""
    Redactor([{"MY_SECRET": "s3same-0pen-now"}], prompts={"a red fox"}).text(unit * (1_000_000 // len(unit)), Counter())


# Files that may be anything -----------------------------------------------------------------------------------------


def test_what_cannot_be_read_says_why_and_keeps_nobody_waiting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    assert read_bounded(tmp_path / "none", 10).gone
    assert "a link" in str(read_bounded(tmp_path / "link", 10).why)
    assert "plain file" in str(read_bounded(tmp_path / "pipe", 10).why)
    assert "plain file" in str(read_bounded(tmp_path, 10).why)
    assert read_bounded(tmp_path / "file", 10).raw == b"x"


def test_of_a_long_file_its_end_stays_in_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("head\n" + "".join(f"line {n:06d}\n" for n in range(1000)))
    cut = read_bounded(path, 100)
    assert cut.cut
    assert cut.size == path.stat().st_size
    assert cut.raw is not None
    assert cut.raw.splitlines()[0].startswith(b"line ")
    assert cut.raw.endswith(b"line 000999\n")
    kept = read_bounded(path, 100, keep_head=True)
    assert kept.raw is not None
    assert kept.raw.startswith(b"head\nline 000")
    assert len(kept.raw) <= 100


# Archives -----------------------------------------------------------------------------------------------------------


def test_an_archive_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    manifest = made(item("z", b"last"), item("a", b"first"), item("gone", None, expected=True))
    archive.write(manifest, path)
    assert path.stat().st_mode & 0o777 == 0o600
    found = archive.read(path)
    assert archive.is_bundle(path)
    assert found.files == {"a": b"first", "z": b"last"}
    assert found.problems == ()
    assert found.manifest["coverage"] == {"checked": 2, "expected": 3}
    assert manifest.verdict is Verdict.UNCHECKED
    with tarfile.open(path) as plain:
        assert plain.getnames() == ["manifest.json", "a", "z"]
    archive.write(manifest, tmp_path / "b.tar.gz")
    assert path.read_bytes() == (tmp_path / "b.tar.gz").read_bytes()
    with pytest.raises(BundleError, match="left as it is"):
        archive.write(manifest, path)
    with pytest.raises(BundleError, match="cannot write"):
        archive.write(manifest, tmp_path / "none" / "a.tar.gz")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def forged(path: Path, *members: tuple[tarfile.TarInfo, bytes], manifest: Manifest | None = None) -> Path:
    raw = json.dumps((manifest or made(item())).to_dict()).encode()
    head = tarfile.TarInfo("manifest.json")
    head.size = len(raw)
    with tarfile.open(path, "w:gz") as packed:
        packed.addfile(head, io.BytesIO(raw))
        for member, data in members:
            packed.addfile(member, io.BytesIO(data))
    return path


def member(name: str, data: bytes = b"x", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (member("../evil"), "TP-8011"),
        (member("/etc/evil"), "TP-8011"),
        (member("runs/../../evil"), "TP-8011"),
        (member("runs/.hidden"), "TP-8011"),
        (member("runs//x"), "TP-8011"),
        (member("a\\b"), "TP-8011"),
        (member("x" * 300), "TP-8011"),
        (member("link", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "TP-8011"),
        (member("link", b"", type=tarfile.LNKTYPE, linkname="manifest.json"), "TP-8011"),
        (member("dir", b"", type=tarfile.DIRTYPE), "TP-8011"),
        (member("pipe", b"", type=tarfile.FIFOTYPE), "TP-8011"),
        (member("device", b"", type=tarfile.CHRTYPE), "TP-8011"),
        (member("manifest.json"), "TP-8011"),
        (member("manifest.json/x"), "TP-8011"),
    ],
)
def test_what_no_bundle_holds_is_refused_before_it_is_written(
    bad: tuple[tarfile.TarInfo, bytes], code: str, tmp_path: Path
) -> None:
    path = forged(tmp_path / "evil.tar.gz", bad)
    with pytest.raises(BundleError) as refused:
        archive.read(path)
    assert refused.value.code == code
    assert [p.name for p in tmp_path.iterdir()] == ["evil.tar.gz"]


def test_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_TOTAL_BYTES", 1 << 20)
    monkeypatch.setattr(archive, "MAX_MEMBERS", 20)
    small = [member(f"f{n}") for n in range(30)]
    for bombs in ([member("big", b"\0" * (2 << 20))], small):
        with pytest.raises(BundleError) as refused:
            archive.read(forged(tmp_path / "bomb.tar.gz", *bombs))
        assert refused.value.code == "TP-8012"
    monkeypatch.setattr(archive, "MAX_TOTAL_BYTES", 1 << 30)
    monkeypatch.setattr(archive, "MAX_MEMBER_BYTES", 1 << 10)
    with pytest.raises(BundleError) as refused:
        archive.read(forged(tmp_path / "bomb.tar.gz", member("big", b"\0" * 2000)))
    assert refused.value.code == "TP-8012"


def test_an_altered_file_and_a_newer_version_are_told(tmp_path: Path) -> None:
    found = archive.read(forged(tmp_path / "a.tar.gz", member("job/job.json", b"{ }"), member("stranger")))
    assert [problem.split()[0] for problem in found.problems] == ["job/job.json", "stranger"]
    newer = made(item()).to_dict() | {"schema_version": 2}
    raw = json.dumps(newer).encode()
    path = tmp_path / "newer.tar.gz"
    with tarfile.open(path, "w:gz") as packed:
        packed.addfile(member("manifest.json", raw)[0], io.BytesIO(raw))
    with pytest.raises(BundleError) as refused:
        archive.read(path)
    assert refused.value.code == "TP-8013"


@pytest.mark.parametrize(
    "runs",
    [({"label": "../x", "lives": {}},), ({"label": "0", "lives": []},), ({"label": "0", "lives": {"a": 1}},), (1,)],
)
def test_a_manifest_cannot_name_a_place_outside(runs: tuple, tmp_path: Path) -> None:
    data = made(item()).to_dict() | {"runs": list(runs)}
    raw = json.dumps(data).encode()
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz") as packed:
        packed.addfile(member("manifest.json", raw)[0], io.BytesIO(raw))
    with pytest.raises(BundleError, match="damaged manifest"):
        archive.read(path)


def test_random_damage_is_refused_or_told(tmp_path: Path) -> None:
    """Flipped bytes, inside the compression and below it, from a fixed seed: never a crash, never a silent change."""
    path = tmp_path / "a.tar.gz"
    archive.write(made(item("a", os.urandom(3000)), item("b", b"text\n" * 400)), path)
    whole, plain, dice = archive.read(path), gzip.decompress(path.read_bytes()), random.Random(5)
    for number in range(120):
        raw = bytearray(path.read_bytes() if number % 2 else plain)
        for _ in range(dice.choice((1, 5, 50))):
            raw[dice.randrange(len(raw))] ^= 1 << dice.randrange(8)
        damaged = tmp_path / "damaged.tar.gz"
        damaged.write_bytes(raw[: dice.randrange(1, len(raw))] if number % 5 == 0 else raw)
        if not number % 2:
            damaged.write_bytes(gzip.compress(damaged.read_bytes()))
        archive.is_bundle(damaged)
        try:
            found = archive.read(damaged)
        except BundleError:
            continue
        assert found.problems or found.files == whole.files
