"""The strict header check, against the safetensors library on good files and by hand on bad ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, save

from statecodec.errors import LayoutError, MalformedCheckpoint
from statecodec.files import MemoryBytes
from statecodec.layouts import tree
from statecodec.layouts.safetensors_file import read_tensors
from tests.layouts.support import found_file, locate_bytes, read_view


def file_of(header: Any, payload: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + payload


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_views_equal_the_library(tmp_path: Path) -> None:
    tensors = {
        "h.0.weight": torch.randn(4, 3),
        "bf16": torch.randn(5).bfloat16(),
        "int": torch.arange(6).reshape(2, 3),
        "bool": torch.tensor([True, False]),
        "fp8": torch.randn(4).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(2.0),
        "empty": torch.empty(0, 3),
        "optimizer.state.h.exp_avg": torch.randn(4, 3),
    }
    path = tmp_path / "m.safetensors"
    path.write_bytes(save(tensors, {"format": "pt"}))
    file = found_file(path)
    assert file.layout == "safetensors"
    for name, tensor in tensors.items():
        found = read_view(path, file, name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
    roles = {r.name: r.role for r in file.regions}
    assert (roles["h.0.weight"], roles["optimizer.state.h.exp_avg"], roles["int"]) == ("weight", "exp_avg", "other")
    assert all(torch.equal(t, tensors[n]) for n, t in tree(path).items())


def test_sub_byte_tensors_are_carried_as_bytes() -> None:
    root, spans = read_tensors(MemoryBytes(file_of({"x": entry("F4", [4, 4], 0, 8)}, bytes(8))))
    assert root.items[0][1].shape == (8,)
    assert spans["x"].nbytes == 8


HOSTILE = {
    "length past the end": file_of({}, length=1000),
    "length 2**63": file_of({}, length=1 << 63),
    "not JSON": file_of(b"{nope}"),
    "not UTF-8": file_of(b'{"\xff": 1}'),
    "not an object": file_of(b'{"__metadata__": {}}'[:0] + b"[]"),
    "duplicate names": file_of(
        b'{"a": {"dtype":"U8","shape":[1],"data_offsets":[0,1]}, "a": {"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"x",
    ),
    "duplicate fields": file_of(b'{"a": {"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"x"),
    "2**60 empty elements": file_of(
        {"a": entry("F32", [1 << 60, 0], 0, 0), "b": entry("F32", [1 << 60, 1 << 60, 0], 0, 0)}
    ),
    "overflowing shape": file_of({"a": entry("F32", [1 << 32, 1 << 32], 0, 0)}),
    "negative shape": file_of({"a": entry("F32", [-1, -1], 0, 4)}, bytes(4)),
    "float shape": file_of({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, bytes(4)),
    "bool shape": file_of({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, bytes(4)),
    "lying size": file_of({"a": entry("F32", [2], 0, 4)}, bytes(4)),
    "past the end": file_of({"a": entry("F32", [2], 0, 8)}, bytes(4)),
    "reversed offsets": file_of({"a": entry("F32", [1], 4, 0)}, bytes(4)),
    "dtype is a list": file_of({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "overlap": file_of({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, bytes(6)),
    "hole": file_of({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 4, 6)}, bytes(6)),
    "hole in front": file_of({"a": entry("U8", [2], 2, 4)}, bytes(4)),
    "trailing bytes": file_of({"a": entry("U8", [2], 0, 2)}, bytes(3)),
    "half a byte": file_of({"a": entry("F4", [3], 0, 1)}, bytes(1)),
    "metadata of numbers": file_of({"__metadata__": {"a": 1}}),
    "extra field": file_of({"a": {**entry("U8", [1], 0, 1), "x": 1}}, b"x"),
    "deep": file_of(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "long integer": file_of(b'{"a":' + b"9" * 100_000 + b"}"),
    "many objects": file_of(b'{"a":[' + b"[]," * 2_000_000 + b"[]]}"),
    "rank": file_of({"a": entry("U8", [1] * 1000, 0, 1)}, b"x"),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_headers_are_malformed(data: bytes) -> None:
    with pytest.raises(MalformedCheckpoint):
        read_tensors(MemoryBytes(data))


GOOD = save({"a": torch.arange(4.0), "b": torch.ones(2, 2, dtype=torch.int16)}, {"k": "v"})


@given(st.integers(0, len(GOOD) * 8 - 1))
def test_bit_flips_give_our_error_or_what_the_library_reads(bit: int) -> None:
    data = bytearray(GOOD)
    data[bit // 8] ^= 1 << bit % 8
    try:
        locate_bytes(bytes(data))
    except LayoutError:
        return
    try:
        load(bytes(data))
    except SafetensorError as error:  # of what we accept, the library lacks only dtypes that are not there yet
        if "unknown variant" not in str(error):
            raise


@given(st.integers(0, len(GOOD) - 1))
def test_truncations_are_malformed(size: int) -> None:
    with pytest.raises(MalformedCheckpoint):
        read_tensors(MemoryBytes(GOOD[:size]))


@given(st.dictionaries(st.text(max_size=8), st.lists(st.integers(0, 3), max_size=3), max_size=5))
def test_any_file_of_the_library_is_read(shapes: dict[str, list[int]]) -> None:
    shapes.pop("__metadata__", None)
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    root, spans = read_tensors(MemoryBytes(save(tensors)))
    assert {n: node.shape for n, node in root.items} == {n: tuple(t.shape) for n, t in tensors.items()}
    assert set(spans) == set(tensors)


def test_a_huge_sparse_file_is_located_from_its_header(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    nbytes = 100 << 30
    head = file_of({"w": entry("BF16", [nbytes // 2048, 1024], 0, nbytes)})
    with path.open("wb") as out:
        out.write(head)
        out.truncate(len(head) + nbytes)
    file = found_file(path)
    assert [(r.nbytes, r.role) for r in file.regions] == [(nbytes, "weight")]
