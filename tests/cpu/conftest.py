"""The nursery that modules with many short jobs share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.nest import Nest


@pytest.fixture(scope="session")
def nest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nest]:
    made = Nest(tmp_path_factory.mktemp("nest") / "nursery.log")
    yield made
    made.close()
