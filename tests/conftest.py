"""Generated tests draw the same examples at every run, so that a fault shows in the change that brought it.

`make campaign` draws new ones. None of them has a time limit of its own: the first call of a kernel compiles it.

Where several processes share the tests, each takes one file at a time, those that take longest first; the files of some
folders go to one process together, so that what they share is made once.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, as some frameworks do

settings.register_profile("suite", deadline=None, derandomize=True)
settings.register_profile("campaign", deadline=None)
settings.load_profile("campaign" if os.environ.get("STATECODEC_RANDOM") else "suite")

LONGEST_FIRST = ("server", "distributed", "tests", "kernels", "frameworks", "integrations", "cli", "layouts")
TOGETHER = {
    "tests/distributed": "ranks",
    "tests/frameworks": "frameworks",
    "tests/integrations": "frameworks",
    "tests/analysis": "models trained",
    "tests/layouts": "folders of DCP",
}
"""What the files of a folder share, be it fixtures or imports that take seconds."""


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the kernels of services, which take half a minute to compile: one for all processes of a run."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "kernels"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the folders whose tests take longest first: what is left for the end is short and keeps all workers busy."""
    rank = {folder: place for place, folder in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.parent.name, len(rank)))


@pytest.hookimpl(optionalhook=True)  # pytest-xdist may be absent
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile` in the order of collection, with some folders as one file each."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return TOGETHER.get(file.rpartition("/")[0], file)

    config.option.loadscopereorder = False
    return Scheduling(config, log)
