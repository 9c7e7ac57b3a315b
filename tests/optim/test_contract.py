"""Every registered optimizer, in every configuration of `helpers.EVERY`, against the contract."""

from __future__ import annotations

import pytest

from statecodec import optim
from tests.contracts.optimizer import Make, OptimizerContract
from tests.optim.helpers import EVERY, parameters


class TestEveryOptimizer(OptimizerContract):
    @pytest.fixture(params=EVERY)
    def make(self, request: pytest.FixtureRequest) -> Make:
        return EVERY[request.param]


def test_every_registered_optimizer_is_among_them() -> None:
    tried = {type(make(parameters().items())) for make in EVERY.values()}
    assert tried == set(optim.OPTIMIZERS.values())
    assert all(name == cls.algorithm for name, cls in optim.OPTIMIZERS.items())
