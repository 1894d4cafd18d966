"""A prompt timeline: what is read, and every refusal."""

import pytest

from engine.errors import ConfigError
from engine.timeline import Event, Timeline

FIRST = {"at_chunk": 0, "prompt": "a fox"}


def test_a_file_is_read(tmp_path):
    path = tmp_path / "t.toml"
    path.write_text(
        '[[event]]\nat_chunk = 0\nprompt = "a fox"\n'
        "[[event]]\nat_chunk = 2\nbias = 1\nrecompute = false\n"
        '[[event]]\nat_chunk = 6\nprompt = "räv"\ncut = true\nbias = 0.5\n',
        encoding="utf-8",
    )
    timeline = Timeline.load(path)
    assert timeline.at(0) == Event(0, "a fox")
    assert timeline.at(1) is None
    assert timeline.at(2) == Event(2, bias=1.0, recompute=False)
    assert timeline.at(6) == Event(6, "räv", cut=True, bias=0.5)


def test_one_prompt():
    assert Timeline.of_prompt("a fox").events == (Event(0, "a fox"),)


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        ([], "TP-1020"),
        ([{**FIRST, "promt": "x"}], "TP-1021"),
        ([FIRST, {"at_chunk": 0, "cut": True}], "TP-1022"),
        ([FIRST, {"at_chunk": 5}, {"at_chunk": 4}], "TP-1022"),
        ([{"prompt": "a fox"}], "TP-1022"),
        ([{"at_chunk": -1, "prompt": "a fox"}], "TP-1022"),
        ([{"at_chunk": True, "prompt": "a fox"}], "TP-1022"),
        ([{"at_chunk": 1, "prompt": "a fox"}], "TP-1023"),
        ([{"at_chunk": 0}], "TP-1023"),
        ([{"at_chunk": 0, "prompt": "  "}], "TP-1023"),
        ([{"at_chunk": 0, "prompt": 3}], "TP-1023"),
        ([{**FIRST, "bias": 0}], "TP-1026"),
        ([{**FIRST, "bias": 1.5}], "TP-1026"),
        ([{**FIRST, "bias": True}], "TP-1026"),
        ([{**FIRST, "cut": 1}], "TP-1026"),
        ([{**FIRST, "recompute": "no"}], "TP-1026"),
    ],
)
def test_refusals(rows, code):
    with pytest.raises(ConfigError) as caught:
        Timeline.from_events(rows, "t.toml")
    assert caught.value.code == code
    assert "t.toml" in caught.value.message
    assert caught.value.exit_code == 77


@pytest.mark.parametrize(
    ("text", "code"),
    [(b"[[event", "TP-1025"), (b"\xff", "TP-1025"), (b"[event]\nat_chunk = 0", "TP-1021"), (b"[evnt]", "TP-1021"),
     (b"", "TP-1020")],
)  # fmt: skip
def test_bad_files(tmp_path, text, code):
    path = tmp_path / "t.toml"
    path.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        Timeline.load(path)
    assert caught.value.code == code


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="No such file") as caught:
        Timeline.load(tmp_path / "none.toml")
    assert caught.value.code == "TP-1024"
