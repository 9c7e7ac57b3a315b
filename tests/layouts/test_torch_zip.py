"""Every view that is located holds what torch.load gives, and regions are what they claim."""

from __future__ import annotations

import argparse
import pathlib
import tarfile
import warnings
import zipfile
import zlib
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.serialization import config

from statecodec.errors import LegacyTorchFile, MalformedCheckpoint, UnknownLayout
from statecodec.layouts import locate
from tests.layouts.support import Net, found_file, pickle_of, read_view, zip_of

DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16,
]  # fmt: skip


class Custom:
    """A class that only the test process knows."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def everything() -> dict[str, Any]:
    base = torch.randn(6, 8)
    return {
        "plain": base.clone(),
        "tied": [base, base],
        "transposed": torch.randn(3, 5).t(),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "expanded": torch.randn(1, 4).expand(7, 4),
        "strided": torch.arange(20.0)[::3],
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "odd": torch.randn(7),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "numpy": np.random.default_rng(0).bit_generator.state,
        "rng": np.random.get_state(),
        "namespace": argparse.Namespace(lr=0.1, weight=torch.ones(2)),
        "path": pathlib.PurePosixPath("/a/b"),
        "custom": Custom(torch.full((4,), 2.0)),
        "ordered": OrderedDict(x=torch.zeros(2)),
        "default": defaultdict(list, y=[torch.ones(1)]),
        ("tuple", 1): torch.ones(3),
        7: {"deep": ({"er": torch.arange(3)},)},
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_view_equals_torch_load(saved: Any, protocol: int) -> None:
    path, file = saved(everything(), pickle_protocol=protocol)
    loaded = torch.load(path, weights_only=False)
    expected = {
        "plain": loaded["plain"], "tied.0": loaded["tied"][0], "tied.1": loaded["tied"][1],
        "transposed": loaded["transposed"], "channels_last": loaded["channels_last"], "expanded": loaded["expanded"],
        "strided": loaded["strided"], "scalar": loaded["scalar"], "empty": loaded["empty"], "odd": loaded["odd"],
        "parameter": loaded["parameter"].detach(), "namespace.weight": loaded["namespace"].weight,
        "custom.tensor": loaded["custom"].tensor, "ordered.x": loaded["ordered"]["x"],
        "default.y.0": loaded["default"]["y"][0],
        "(tuple,1)": loaded["tuple", 1], "7.deep.0.er": loaded[7]["deep"][0]["er"],
    }  # fmt: skip
    assert {v.name for v in file.views} == set(expected)
    for name, tensor in expected.items():
        found = read_view(path, file, name)
        assert found.dtype == tensor.dtype
        assert found.stride() == tensor.stride()
        assert torch.equal(found, tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_regions_keep_the_true_dtype(saved: Any, dtype: torch.dtype) -> None:
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    path, file = saved({"x": tensor})
    assert [(r.dtype, r.shape, r.lossless) for r in file.regions] == [(dtype, (3, 4), False)]
    assert torch.equal(read_view(path, file, "x").view(torch.uint8), tensor.view(torch.uint8))


def test_permuted_tensors_are_regions_in_physical_order(saved: Any) -> None:
    _, file = saved({"t": torch.randn(3, 5).t(), "c": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)})
    assert [(r.name, r.shape, r.lossless) for r in file.regions] == [("t", (3, 5), False), ("c", (2, 4, 5, 3), False)]


def test_a_tied_and_a_transposed_name_share_one_region(saved: Any) -> None:
    w = torch.randn(4, 6)
    _, file = saved({"a": w, "b": w.detach(), "c": w.t()})
    assert [(r.name, r.shape, r.lossless) for r in file.regions] == [("a", (4, 6), False)]
    assert [v.name for v in file.views] == ["a", "b", "c"]


def test_disjoint_slices_are_regions_and_the_gap_is_skeleton(saved: Any) -> None:
    flat = torch.arange(100.0)
    path, file = saved({"a": flat[:12].view(3, 4), "b": flat[20:30]})
    assert [(r.name, r.shape, r.nbytes, r.lossless) for r in file.regions] == [
        ("a", (3, 4), 48, False),
        ("b", (10,), 40, False),
    ]
    assert file.regions[1].offset - file.regions[0].offset == 80
    assert torch.equal(read_view(path, file, "b"), flat[20:30])


@pytest.mark.parametrize(
    "make",
    [
        lambda x: {"a": x[:6], "b": x[4:]},  # overlap
        lambda x: {"a": x[::2]},  # strided
        lambda x: {"a": x[:1].expand(5)},  # expanded
        lambda x: {"a": x, "b": x[2:4]},  # one inside of another
        lambda x: {"a": torch.as_strided(x, (3, 3), (1, 1))},  # a window over itself
    ],
)
def test_anything_else_is_lossless(saved: Any, make: Any) -> None:
    path, file = saved(make(torch.arange(10.0)))
    assert [r.lossless for r in file.regions] == [True]
    for name, tensor in torch.load(path).items():
        assert torch.equal(read_view(path, file, name), tensor)


def test_two_dtypes_on_one_storage_are_lossless(tmp_path: Path) -> None:
    storage = b"".join(
        b"ctorch._utils\n_rebuild_tensor_v3\n((X\x07\x00\x00\x00storage"
        b"ctorch.storage\nUntypedStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x10tQK"
        + bytes([offset])
        + b"K\x02\x85K\x01\x85\x89}ctorch\n"
        + dtype
        + b"\ntR"
        for offset, dtype in ((0, b"float32"), (3, b"int16"))
    )
    path = tmp_path / "x.pt"
    path.write_bytes(zip_of(b"\x80\x02]" + b"(" + storage + b"e.", {"0": bytes(range(16))}))
    loaded = torch.load(path)
    file = found_file(path)
    assert [(r.dtype, r.nbytes, r.lossless) for r in file.regions] == [(torch.uint8, 16, True)]
    for i, tensor in enumerate(loaded):
        assert torch.equal(read_view(path, file, str(i)), tensor)


def test_a_storage_without_a_tensor_is_lossless(saved: Any) -> None:
    _, file = saved({"s": torch.arange(4.0).untyped_storage()})
    assert [(r.name, r.nbytes, r.lossless) for r in file.regions] == [("storage:0", 16, True)]


def test_quantised_tensors_are_their_integers(saved: Any) -> None:
    with warnings.catch_warnings():  # torch says once in a process that they are deprecated
        warnings.simplefilter("ignore")
        path, file = saved({"q": torch.quantize_per_tensor(torch.tensor([0.1, -0.2, 0.3]), 0.1, 0, torch.qint8)})
    assert [(r.dtype, r.shape) for r in file.regions] == [(torch.int8, (3,))]
    assert read_view(path, file, file.views[0].name).tolist() == [1, -2, 3]


def test_parameter_state_and_subclasses_are_followed(saved: Any) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    param.extra = torch.full((2,), 5.0)
    _, file = saved({"p": param})
    assert {v.name for v in file.views} == {"p", "p.state.extra"}


def test_whole_modules_are_read(saved: Any) -> None:
    path, file = saved(Net())
    names = {v.name: v for v in file.views}
    assert torch.equal(
        read_view(path, file, "_modules.fc._parameters.weight"), torch.load(path, weights_only=False).fc.weight.detach()
    )
    region = file.regions[names["_modules.fc._parameters.weight"].region]
    assert (region.role, region.param) == ("weight", "fc.weight")
    assert file.regions[names["_modules.bn._buffers.running_mean"].region].role == "other"


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.bin", "a.ckpt", "a.pth.tar", "a"])
def test_the_content_decides_not_the_extension(saved: Any, name: str) -> None:
    _, file = saved({"x": torch.ones(2)}, name=name)
    assert (file.layout, file.path) == ("torch_zip", name)


def test_crcs_stand_where_they_are_reported(saved: Any) -> None:
    path, file = saved({"x": torch.randn(50), "y": torch.randn(3)})
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        expected = {i.CRC for i in archive.infolist() if "/data/" in i.filename}
    assert len(file.crcs) == 2
    for crc in file.crcs:
        stored = {int.from_bytes(data[at : at + 4], "little") for at in crc.at}
        assert stored == {zlib.crc32(data[crc.offset : crc.offset + crc.nbytes])}
        assert stored <= expected
        assert len(crc.at) == 2  # descriptor and directory: torch leaves the local header's at 0


def test_a_rewritten_payload_with_new_crcs_is_a_valid_archive(saved: Any, tmp_path: Path) -> None:
    path, file = saved({"x": torch.randn(50)})
    data, crc = bytearray(path.read_bytes()), file.crcs[0]
    region = file.regions[0]
    data[region.offset : region.offset + 4] = b"\0\0\0\0"
    for at in crc.at:
        data[at : at + 4] = zlib.crc32(data[crc.offset : crc.offset + crc.nbytes]).to_bytes(4, "little")
    changed = tmp_path / "changed.pt"
    changed.write_bytes(data)
    with zipfile.ZipFile(changed) as archive:
        assert archive.testzip() is None
    assert torch.load(changed)["x"][0] == 0


def test_archives_without_crcs_report_none(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with config.patch("save.compute_crc32", False):
        torch.save({"x": torch.randn(5)}, path)
    file = found_file(path)
    assert file.crcs == ()
    assert len(file.regions) == 1


def test_ordinary_zip_tools_may_have_written_it(tmp_path: Path) -> None:
    """No data descriptors: the CRC stands in the local header and in the directory."""
    path = tmp_path / "x.pt"
    path.write_bytes(zip_of(pickle_of({"x": torch.arange(4.0)}), {"0": torch.arange(4.0).numpy().tobytes()}))
    file = found_file(path)
    assert torch.equal(read_view(path, file, "x"), torch.arange(4.0))
    assert len(file.crcs[0].at) == 2


def test_legacy_files_are_refused_with_a_way_out(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save({"x": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(LegacyTorchFile, match=r"before torch 1\.6.*torch\.save"):
        locate(path)


def test_old_tar_files_are_legacy(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    (tmp_path / "sys_info").write_bytes(b"x")
    with tarfile.open(path, "w") as tar:
        tar.add(tmp_path / "sys_info", "sys_info")
    with pytest.raises(LegacyTorchFile):
        locate(path)


def test_torchscript_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    path.write_bytes(zip_of(pickle_of({}), {}, **{"constants.pkl": b"\x80\x02).", "code/x.py": b""}))
    with pytest.raises(UnknownLayout, match="TorchScript"):
        locate(path)


def test_big_endian_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "big.pt"
    path.write_bytes(zip_of(pickle_of({}), {}, byteorder=b"big"))
    with pytest.raises(MalformedCheckpoint, match="big-endian"):
        locate(path)


@pytest.mark.parametrize(
    ("content", "match"),
    [(b"", "empty"), (b"hello world, this is text", "neither"), (b"\x80\x04K\x01.", "bare pickle")],
)
def test_other_files_are_unknown(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises((UnknownLayout, MalformedCheckpoint), match=match):
        locate(path)


def test_a_missing_file_is_our_error(tmp_path: Path) -> None:
    with pytest.raises(UnknownLayout, match="cannot be read"):
        locate(tmp_path / "nothing.pt")
