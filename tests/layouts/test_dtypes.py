"""Every dtype that torch.save takes goes through; what has no codec is carried as bytes."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

import statecodec
from tests.layouts.support import found_file, pickle_of, zip_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.filterwarnings("ignore:.* deprecated"),
]
DTYPES = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str)
MAKERS = (
    lambda dtype: torch.quantize_per_tensor(torch.randn(8), 0.1, 0, dtype),
    lambda dtype: torch.quantize_per_channel(torch.randn(4, 4), torch.ones(4) * 0.1, torch.zeros(4), 0, dtype),
    lambda dtype: torch.arange(4096).to(dtype),
    lambda dtype: torch.arange(4096).to(torch.uint8).view(dtype),
)


def tensor_of(dtype: torch.dtype) -> torch.Tensor | None:
    for make in MAKERS:
        with contextlib.suppress(RuntimeError, NotImplementedError, TypeError):
            return make(dtype)
    return None


@pytest.fixture(scope="module")
def saved_dtypes(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    """Every dtype that this torch can make a tensor of and save."""
    folder, found = tmp_path_factory.mktemp("dtypes"), {}
    for dtype in DTYPES:
        tensor = tensor_of(dtype)
        if tensor is None:
            continue
        path = folder / f"{dtype}.pt"
        try:
            torch.save({"odd": tensor, "beside": torch.ones(3), "view": tensor[:2] if tensor.dim() == 1 else 0}, path)
        except (KeyError, RuntimeError, TypeError, NotImplementedError):  # uint1 ... int7 have no storage to save
            path.unlink(missing_ok=True)
            continue
        found[dtype] = path
    return found


def test_the_known_dtypes_are_among_those_tried(saved_dtypes: dict[torch.dtype, Path]) -> None:
    names = {str(d).removeprefix("torch.") for d in saved_dtypes}
    assert {
        "float32",
        "complex32",
        "float4_e2m1fn_x2",
        "bits8",
        "bits16",
        "quint4x2",
        "quint8",
        "float8_e8m0fnu",
    } <= names


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_restored_bit_for_bit(dtype: torch.dtype, saved_dtypes: dict[torch.dtype, Path]) -> None:
    if dtype not in saved_dtypes:
        pytest.skip(f"torch.save does not take {dtype}")
    path = saved_dtypes[dtype]
    packed, back = path.with_suffix(".sc.safetensors"), path.with_suffix(".back")
    statecodec.compress(path, packed, verify=True)
    statecodec.restore(packed, back)
    assert back.read_bytes() == path.read_bytes()
    original, loaded = torch.load(path), statecodec.load(packed)
    assert torch.equal(loaded["beside"], original["beside"])
    if isinstance(loaded["odd"], torch.Tensor):
        assert loaded["odd"].dtype is original["odd"].dtype
        assert bytes(loaded["odd"].untyped_storage()) == bytes(original["odd"].untyped_storage())


def test_a_storage_class_of_a_newer_torch_is_carried_as_bytes(tmp_path: Path) -> None:
    """`torch.HalfStorage` renamed to a class that this torch lacks: its elements' size is not known."""
    data = pickle_of({"new": torch.ones(8, dtype=torch.float16)}).replace(b"HalfStorage", b"TinyStorage")
    path, packed, back = (tmp_path / n for n in ("new.pt", "new.sc.safetensors", "back.pt"))
    path.write_bytes(zip_of(data, {"0": bytes(range(16))}))
    (region,) = found_file(path).regions
    assert (region.dtype, region.shape) == (torch.uint8, (16,))
    statecodec.compress(path, packed, verify=True)
    statecodec.restore(packed, back)
    assert back.read_bytes() == path.read_bytes()
    assert "opaque" in repr(statecodec.load(packed)["new"])


def test_a_safetensors_dtype_of_a_newer_version_is_carried_as_bytes(tmp_path: Path) -> None:
    new = b'"a":{"dtype":"F3_E1M1","shape":[8],"data_offsets":[0,3]}'
    header = b"{" + new + b',"b":{"dtype":"F32","shape":[1],"data_offsets":[3,7]}}'
    path = tmp_path / "new.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"abc\0\0\0\0")
    a, b = found_file(path).regions
    assert (a.dtype, a.shape, b.dtype, b.shape) == (torch.uint8, (3,), torch.float32, (1,))


def test_complex_weights_are_weights(saved: Any) -> None:
    layer = torch.nn.Linear(4, 4, dtype=torch.complex64)
    _, file = saved({"model": layer.state_dict()})
    assert {r.role for r in file.regions} == {"weight"}
