"""What the reader refuses the writer refuses first: compress either raises an error of ours, or its output reads."""

from __future__ import annotations

import contextlib
import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

import statecodec
from statecodec.errors import StatecodecError, UsageError

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64]
PRESETS = ["lossless", "resume", "tiny", "weights"]
SETTINGS = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

names = st.text(max_size=12) | st.sampled_from(
    [
        "w",
        "a/b",
        "a|b",
        "__manifest__",
        "__packed_0__",
        "skeleton",
        "tree",
        "x" * 300,
        "state",
        "param_groups",
        "é\ud800",
        "",
    ]
)
sizes = st.integers(0, 5) | st.sampled_from([70, 1 << 20, 1 << 40, 1 << 61])


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Small in memory; some look at it in odd ways."""
    dtype = draw(st.sampled_from(DTYPES))
    base = (torch.arange(draw(st.integers(0, 200))) % 7).to(dtype)
    how = draw(st.sampled_from(["as it is", "every other", "transposed", "expanded", "empty", "scalar", "part"]))
    if how == "expanded" and base.numel():
        return base[:1].expand(tuple(draw(st.lists(sizes.filter(bool), min_size=1, max_size=1))))
    if how == "empty":
        return torch.empty((draw(st.integers(0, 1 << 30)), 0, draw(st.integers(0, 5))), dtype=dtype)
    if how == "transposed" and base.numel() >= 6:
        return base[:6].view(2, 3).t()
    if how == "scalar" and base.numel():
        return base[0]
    return base[::2] if how == "every other" else base[3:] if how == "part" else base


leaves = tensors() | st.none() | st.integers() | st.floats() | st.text(max_size=5)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names | st.integers(0, 9), inner, max_size=5),
    max_leaves=12,
)


def check(source: Path, preset: str) -> None:
    """Compress; if that goes well, everything else must, and a lossless file restores to the same bytes."""
    packed = source.with_suffix(".sc.safetensors")
    packed.unlink(missing_ok=True)
    try:
        statecodec.compress(source, packed, preset=preset, force=True)
    except StatecodecError:
        assert not packed.exists()
        return
    statecodec.verify(packed, against=source)
    statecodec.inspect(packed)
    loads, again = False, source.with_suffix(".again")
    statecodec.restore(packed, again, force=True)
    if preset == "lossless":
        assert again.read_bytes() == source.read_bytes()
    with contextlib.suppress(StatecodecError):  # a dict with a key that cannot be one: neither loads
        statecodec.load(source)
        loads = True
    if loads:
        statecodec.load(packed)


@SETTINGS
@given(value=values, preset=st.sampled_from(PRESETS))
def test_values(tmp_path: Path, value: Any, preset: str) -> None:
    torch.save(value, tmp_path / "x.pt")
    check(tmp_path / "x.pt", preset)


@SETTINGS
@given(
    content=st.dictionaries(st.text(max_size=8), st.lists(st.integers(0, 70), max_size=3), max_size=6),
    metadata=st.none() | st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3),
    preset=st.sampled_from(PRESETS),
)
def test_safetensors(tmp_path: Path, content: dict[str, list[int]], metadata: Any, preset: str) -> None:
    found = {name: torch.zeros(shape) for name, shape in content.items() if name != "__metadata__"}
    (tmp_path / "x.safetensors").write_bytes(save(found, metadata))
    check(tmp_path / "x.safetensors", preset)


def checkpoint() -> bytes:
    data = io.BytesIO()
    weights = {f"l.{i}.w": torch.randn(20, 30) for i in range(3)}
    state = {
        i: {"exp_avg": torch.randn(20, 30), "exp_avg_sq": torch.rand(20, 30), "step": torch.tensor(3.0)}
        for i in range(3)
    }
    group = {"params": [0, 1, 2], "betas": (0.9, 0.99), "eps": 1e-8, "lr": 1e-3}
    torch.save({"model": weights, "optimizer": {"state": state, "param_groups": [group]}}, data)
    return data.getvalue()


GOOD = checkpoint()
PICKLE = zipfile.ZipFile(io.BytesIO(GOOD)).read("archive/data.pkl")


@SETTINGS
@given(
    changes=st.lists(st.tuples(st.integers(0, len(PICKLE) - 8), st.integers(0, 255)), min_size=1, max_size=4),
    numbers=st.lists(
        st.tuples(st.integers(0, len(PICKLE) - 8), st.sampled_from([0, 1, 1 << 31, (1 << 32) - 1])), max_size=2
    ),
    preset=st.sampled_from(PRESETS),
)
def test_pickles_that_lie(
    tmp_path: Path, changes: list[tuple[int, int]], numbers: list[tuple[int, int]], preset: str
) -> None:
    """Shapes, strides, offsets, names and settings of a checkpoint, changed; its zip stays whole."""
    pickle = bytearray(PICKLE)
    for at, value in changes:
        pickle[at] = value
    for at, number in numbers:
        struct.pack_into("<I", pickle, at, number)
    source = tmp_path / "x.pt"
    with zipfile.ZipFile(source, "w", zipfile.ZIP_STORED) as target, zipfile.ZipFile(io.BytesIO(GOOD)) as good:
        for name in good.namelist():
            target.writestr(name, bytes(pickle) if name == "archive/data.pkl" else good.read(name))
    check(source, preset)


def test_the_sources_these_are_made_of_are_taken(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(GOOD)
    for preset in PRESETS:
        check(tmp_path / "x.pt", preset)
        assert statecodec.compress(tmp_path / "x.pt", tmp_path / f"{preset}.sc.safetensors", preset=preset).bytes


STRETCHED = {
    "square": torch.tensor([1.5]).expand(1 << 25, 1 << 25),
    "long": torch.tensor([1.5]).expand(1 << 40),
    "longer than a file": torch.tensor([1.5]).expand(1 << 51),
    "the longest": torch.tensor([1.5]).expand(1 << 40, (1 << 23) - 1),
    "a stride that no step is made with": torch.ones(1, 1).as_strided((1, 1), (1 << 60, 1)),
}


@pytest.mark.parametrize("kind", STRETCHED)
def test_a_view_that_repeats_its_elements(tmp_path: Path, kind: str) -> None:
    view = STRETCHED[kind]
    torch.save({"x": view, "w": torch.ones(9)}, tmp_path / "x.pt")
    report = statecodec.compress(tmp_path / "x.pt", preset="lossless")
    loaded = statecodec.load(report.path)["x"]
    assert (loaded.shape, loaded.stride()) == (view.shape, view.stride())
    statecodec.restore(report.path, tmp_path / "y.pt")
    assert (tmp_path / "y.pt").read_bytes() == (tmp_path / "x.pt").read_bytes()


@pytest.mark.parametrize("layout", ["safetensors", "dcp"])
def test_what_one_number_claims_to_be_is_not_written_out(tmp_path: Path, layout: str) -> None:
    stretched = {name: view for name, view in STRETCHED.items() if view.numel() > 1}
    torch.save({**stretched, "wide": torch.arange(3.0).expand(4, 3), "w": torch.ones(9)}, tmp_path / "x.pt")
    report = statecodec.convert(tmp_path / "x.pt", tmp_path / "made", layout=layout)
    assert sum("repeats the elements" in note for note in report.notes) == len(stretched)
    assert {t.name for t in report.tensors if t.role not in ("skeleton", "file")} == {"wide", "w"}
    with pytest.raises(UsageError, match="repeats the elements"):
        statecodec.convert(tmp_path / "x.pt", tmp_path / "made", layout=layout, strict=True, force=True)
