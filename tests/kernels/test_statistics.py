"""The size of an update, against numpy float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from statecodec import kernels

FIRST = st.floats(-1e3, 1e3, width=32) | st.sampled_from([0.0, float("nan"), float("inf"), -1e-30])
SECOND = st.floats(0, 1e3, width=32) | st.sampled_from([0.0, -1.0, float("nan"), float("inf"), 1e-38])


@given(data=st.data(), n=st.integers(0, 600))
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_update_size(backend: str, data: st.DataObject, n: int) -> None:
    m = data.draw(arrays(np.float32, n, elements=FIRST, fill=st.just(0.5)))
    v = data.draw(arrays(np.float32, n, elements=SECOND, fill=st.just(0.25)))
    with np.errstate(all="ignore"):
        u = m.astype(np.float64) / (np.sqrt(v.astype(np.float64)) + 1e-8)
        u = u[np.isfinite(u) & ((v > 0) | (np.abs(u) < 1))]
    host = kernels.get(backend)
    numel, sum_sq = host.update_size(torch.from_numpy(m), torch.from_numpy(v), eps=1e-8)  # type: ignore[attr-defined]
    assert numel == u.size
    assert sum_sq == pytest.approx(float((u * u).sum()), rel=1e-5)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 5000])
def test_size(backend: str, n: int) -> None:
    x = np.random.default_rng(n).normal(size=n).astype(np.float32) * np.float32(1e20)
    bad = x.copy()
    bad[n // 3 : n // 3 + 3] = [np.nan, -np.inf, np.inf][: len(bad[n // 3 : n // 3 + 3])]
    host = kernels.get(backend)
    for values in (x, bad):
        finite = values[np.isfinite(values)].astype(np.float64)
        found = host.size(torch.from_numpy(values))  # type: ignore[attr-defined]
        assert found.sum_sq == pytest.approx(float((finite**2).sum()), rel=1e-9)
        assert found.largest == float(np.abs(finite).max(initial=0.0))
