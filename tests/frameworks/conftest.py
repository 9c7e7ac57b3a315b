"""Checkpoints that frameworks write, made once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.frameworks.huggingface import Trained


@pytest.fixture(scope="session")
def by_trainer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """by_trainer(model) -> what transformers' Trainer saved after one step; models are those of huggingface.MODELS."""
    from tests.frameworks.huggingface import MODELS, trained

    @cache
    def saved(name: str) -> Trained:
        return trained(MODELS[name](), tmp_path_factory.mktemp("trainer"))

    return saved
