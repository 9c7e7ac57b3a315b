"""Ranks: processes that stay up for the whole session and run functions as process groups of 1 to 4 of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.ranks import PATIENCE, Ranks


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ranks that hang end themselves and say where; on a busy machine, to start them alone may take minutes."""
    for item in items:
        if "ranks" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(3 * PATIENCE))


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    started = Ranks()
    yield started
    started.stop()
