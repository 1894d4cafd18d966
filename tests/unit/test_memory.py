"""What allocators say when they refuse, and how much was asked for: their words, as their libraries write them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.failures import guard
from engine.memory import ASKED, WORDS, named, names_shortage
from engine.report import RankReport

REFUSED = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB."


@pytest.mark.parametrize("make", [lambda: torch.empty(1 << 50, dtype=torch.uint8), lambda: np.empty(1 << 50, np.uint8)])
def test_the_words_of_a_real_refusal_are_known(make) -> None:
    """2**50 bytes are beyond what any host here can map."""
    with pytest.raises((RuntimeError, MemoryError)) as refused:
        make()
    assert WORDS.search(str(refused.value))
    asked = ASKED.search(str(refused.value))
    assert asked
    assert (float(asked[1]), asked[2]) in ((float(1 << 50), "bytes"), (1.0, "PiB"))


def test_a_device_says_it_in_other_words() -> None:
    assert WORDS.search(REFUSED)
    assert ASKED.search(REFUSED).groups() == ("20.00", "MiB")


@pytest.mark.parametrize("other", ["Connection closed by peer", "mat1 and mat2 shapes cannot be multiplied"])
def test_other_errors_are_none(other: str) -> None:
    assert not WORDS.search(other)


class Loading:
    """A rank's run that loads more than there is, with what `names_shortage` asks of it."""

    def __init__(self) -> None:
        self.context = SimpleNamespace(named=lambda error: named(error, 3, {"chunk_index": -1}))

    @names_shortage
    def run(self) -> None:
        torch.empty(1 << 50, dtype=torch.uint8)


def test_a_refusal_before_the_first_chunk_is_told_like_one_in_it(tmp_path, capsys) -> None:
    """Most shortages come while weights are loaded."""
    report = RankReport(tmp_path / "rank3.json", 3)
    assert guard(Loading().run, report) == 70
    assert report.error["code"] == "TP-6601"
    assert "rank 3 asked for 1125899906842624 bytes in vain, before its first chunk" in report.error["message"]
    assert "rank 3: TP-6601" in capsys.readouterr().err
