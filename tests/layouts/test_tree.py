"""What the tree gives is what torch.load gives, with opaque objects where torch would run code."""

from __future__ import annotations

import argparse
import pathlib
import random
from collections import Counter, OrderedDict, defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from statecodec.dtypes import FLOAT32, DType
from statecodec.errors import MalformedCheckpoint
from statecodec.files import MemoryBytes
from statecodec.layouts import ListedFile, Listing, OpaqueObject, tree, tree_from_pickle
from tests.layouts.support import Net, pickle_of, split_groups, train


def same(a: Any, b: Any) -> bool:
    """Deep equality of what plain checkpoints hold, types included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        flags = (a.dtype, a.shape, a.stride(), a.requires_grad) == (b.dtype, b.shape, b.stride(), b.requires_grad)
        return flags and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.flags.c_contiguous == b.flags.c_contiguous and np.array_equal(a, b)
    if isinstance(a, dict):
        return (
            list(a) == list(b)
            and all(same(a[k], b[k]) for k in a)
            and getattr(a, "__dict__", 0) == getattr(b, "__dict__", 0)
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


PLAIN = {
    "none": None, "bools": [True, False], "ints": [0, -1, 255, 65536, -(1 << 40), 1 << 200], "float": 1.5,
    "text": "h\u00e9llo \U0001f600", "bytes": b"\x00\xff", "array": bytearray(b"abc"), "complex": 1 + 2j,
    "tuple": (1, (2, ()), [3]), "set": {1, "a"}, "frozen": frozenset({(1, 2)}), "range": range(2, 9, 3),
    "slice": slice(1, None),
    "ordered": OrderedDict(b=1, a=2), "default": defaultdict(list, x=[1]), "counter": Counter("aab"),
    "size": torch.Size([2, 3]), "dtype": torch.bfloat16, "device": torch.device("cpu"), "cuda": torch.device("cuda", 3),
    ("key", 1): 1, 3: 4, 2.5: None, None: 0,
    "np": np.arange(12, dtype=np.int16).reshape(3, 4), "fortran": np.asfortranarray(np.random.rand(3, 2)),
    "scalar": np.float32(2.5), "big": np.arange(3, dtype=">i4"), "bool_": np.array([True]), "zero": np.zeros((0, 2)),
}  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_objects_come_back_equal(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "x.pt"
    torch.save(PLAIN, path, pickle_protocol=protocol)
    assert same(tree(path), torch.load(path, weights_only=False))


@pytest.mark.parametrize("protocol", [2, 5])
def test_a_training_checkpoint_comes_back_equal(tmp_path: Path, protocol: int) -> None:
    model = Net()
    optimizer = torch.optim.AdamW(split_groups(model))
    train(model, optimizer)
    state = {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "numpy": np.random.get_state(),
        "python": random.getstate(), "torch": torch.get_rng_state(), "parameter": torch.nn.Parameter(torch.ones(2)),
    }  # fmt: skip
    path = tmp_path / "x.pt"
    torch.save(state, path, pickle_protocol=protocol)
    found, expected = tree(path), torch.load(path, weights_only=False)
    assert same(found, expected)
    assert found["model"]._metadata == expected["model"]._metadata
    fresh = torch.optim.AdamW(split_groups(Net()))
    fresh.load_state_dict(found["optimizer"])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(1, 4).expand(3, 4),
        torch.arange(9.0)[::2],
        torch.randn(3, dtype=torch.complex64).conj(), torch.randn(3, dtype=torch.complex64).conj().imag,
        torch.eye(4).to_sparse(), torch.ones(2, 2, requires_grad=True), torch.randn(3).to(torch.float8_e5m2),
        torch.empty(0, 3), torch.tensor(True), torch.ones(3, dtype=torch.uint16),
    ],
    ids=lambda t: f"{t.dtype}{tuple(t.shape)}{t.layout}",
)  # fmt: skip
def test_tensors_of_all_kinds(tmp_path: Path, tensor: torch.Tensor) -> None:
    path = tmp_path / "x.pt"
    torch.save([tensor], path)
    found, expected = tree(path)[0], torch.load(path)[0]
    assert (found.dtype, found.layout, found.requires_grad) == (expected.dtype, expected.layout, expected.requires_grad)
    assert (found.is_conj(), found.is_neg()) == (expected.is_conj(), expected.is_neg())
    if found.dtype is torch.float8_e5m2:
        found, expected = found.float(), expected.float()
    assert torch.equal(found.to_dense(), expected.to_dense())


def test_meta_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(torch.zeros(3, 4, device="meta"), path)
    found = tree(path)
    assert (found.device.type, found.shape) == ("meta", (3, 4))


def test_sharing_survives(tmp_path: Path) -> None:
    w = torch.zeros(4, 4)
    shared = [1]
    cycle: list[Any] = [w]
    cycle.append((cycle,))
    path = tmp_path / "x.pt"
    torch.save({"a": w, "b": w, "t": w.t(), "row": w[1], "x": shared, "y": shared, "cycle": cycle}, path)
    found = tree(path)
    found["a"][1, 0] = 7
    assert found["t"][0, 1] == 7
    assert found["row"][0] == 7
    assert found["b"] is found["a"]
    assert found["x"] is found["y"]
    assert found["cycle"][1][0] is found["cycle"]


class Custom(dict):  # type: ignore[type-arg]
    """A dict subclass with attributes."""


def test_unknown_objects_are_opaque_and_keep_their_contents(tmp_path: Path) -> None:
    custom = Custom(k=torch.ones(2))
    custom.note = "hi"
    namespace = argparse.Namespace(lr=0.1, tensor=torch.ones(3))
    path = tmp_path / "x.pt"
    torch.save(
        {"ns": namespace, "custom": custom, "path": pathlib.PurePosixPath("/a/b"), "cls": argparse.Namespace}, path
    )
    found = tree(path)
    assert isinstance(found["ns"], OpaqueObject)
    assert (found["ns"].module, found["ns"].name) == ("argparse", "Namespace")
    assert found["ns"].state["lr"] == 0.1
    assert torch.equal(found["ns"].state["tensor"], torch.ones(3))
    assert "argparse.Namespace" in repr(found["ns"])
    assert "lr" in repr(found["ns"])
    assert torch.equal(dict(found["custom"].items)["k"], torch.ones(2))
    assert found["custom"].state == {"note": "hi"}
    assert found["path"].name.endswith("PosixPath")
    assert found["cls"].args is None
    assert "reference" in repr(found["cls"])


def test_the_callback_supplies_the_tensors() -> None:
    asked = []

    def tensor(key: str, dtype: DType, shape: Any, stride: Any, offset: int) -> torch.Tensor:
        asked.append((key, dtype, shape, stride, offset))
        return torch.full(shape, 9.0)

    found = tree_from_pickle(pickle_of({"a": torch.zeros(2, 3).t()}), tensor)
    assert asked == [("0", FLOAT32, (3, 2), (1, 3), 0)]
    assert torch.equal(found["a"], torch.full((3, 2), 9.0))


def test_only_the_skeleton_is_read_from_the_source(tmp_path: Path) -> None:
    """The payload comes from the callback: file ranges of the restored file."""
    path = tmp_path / "x.pt"
    w = torch.arange(4096.0)
    torch.save({"w": w}, path)
    content = path.read_bytes()
    payload = content.index(w.numpy().tobytes())

    class Skeleton(MemoryBytes):
        def read(self, offset: int, nbytes: int) -> bytes:
            # The head may reach into the payload: it is looked at, not believed.
            assert offset == 0 or offset + nbytes <= payload or offset >= payload + w.nbytes
            return super().read(offset, nbytes)

    def read(name: str, offset: int, nbytes: int) -> torch.Tensor:
        assert (name, offset, nbytes) == ("x.pt", payload, w.nbytes)
        return (w * 2).view(torch.uint8)

    file = ListedFile("x.pt", len(content), lambda: nullcontext(Skeleton(content)))
    assert torch.equal(tree(Listing({"x.pt": file}, is_directory=False), read)["w"], w * 2)


@pytest.mark.parametrize(
    "pickle",
    [
        b"\x80\x02}]K\x01s.",  # a list as a key
        b"\x80\x02})" + b"\x85" * 100_000 + b"K\x01s.",  # hashing would recurse through C
        b"\x80\x02})" + b"q\x00h\x00h\x00\x87" * 60 + b"K\x01s.",  # 3**60 visits
        b"\x80\x02}("
        + b"".join(b"\x8a\x0a" + ((2**61 - 1) * i).to_bytes(10, "little") + b"N" for i in range(1, 50_000))
        + b"u.",
    ],
    ids=["list", "deep tuple", "bushy tuple", "collisions"],
)
def test_keys_that_cannot_be_keys_are_malformed(pickle: bytes) -> None:
    with pytest.raises(MalformedCheckpoint):
        tree_from_pickle(pickle, lambda *_: torch.empty(0))


def test_depth_costs_no_stack() -> None:
    for pickle in (b"]" * 200_000 + b"a" * 199_999, b"}N" * 200_000 + b"N" + b"s" * 200_000, b")" + b"\x85" * 200_000):
        tree_from_pickle(b"\x80\x02" + pickle + b".", lambda *_: torch.empty(0))
