"""DCP folders that torch.distributed.checkpoint saved, on one rank and sharded over two; and folders that lie."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

import statecodec
from statecodec.checkpoint.spill import Spill
from statecodec.checkpoint.stored import StoredCheckpoint
from statecodec.errors import LayoutError, MalformedCheckpoint, UnknownLayout, UsageError
from statecodec.layouts import Box, dcp, list_path, locate, tree
from statecodec.layouts.payload import Memory
from tests.contracts.layout import check_located, same

PARAMS = {"emb.weight", "fc.weight", "fc.bias", "ln.weight", "ln.bias"}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def object_of(folder: Path) -> Any:
    return torch.load(folder.with_suffix(".pt"), weights_only=False)


@pytest.mark.parametrize("form", ["nested", "flat"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_tensors_roles_and_moments(form: str, ranks: int, dcp_alone: Path, dcp_sharded: Path) -> None:
    folder = (dcp_alone if ranks == 1 else dcp_sharded) / form
    source = locate(folder)
    check_located(source, contents(folder))
    tensors = {t.name: t for t in source.tensors}
    assert {t.param for t in source.tensors if t.role == "weight"} == PARAMS
    assert {t.param for t in source.tensors if t.role == "exp_avg_sq"} == PARAMS
    assert {tensors["model.mask"].role, tensors["extra.tensor"].role} == {"other"}
    assert tensors["optimizer.state.fc.bias.step"].role == "step"
    fc = tensors["model.fc.weight"]
    assert len(fc.pieces) == ranks
    if ranks == 2:
        assert [p.part for p in fc.pieces] == [Box((0, 0), (96, 64)), Box((96, 0), (96, 64))]
    assert {m.param for m in source.moments} == PARAMS
    moments = next(m for m in source.moments if m.param == "fc.weight")
    assert (moments.exp_avg, moments.weight) == ("optimizer.state.fc.weight.exp_avg", "model.fc.weight")
    assert (moments.beta2, moments.lr, moments.step) == (0.95, 1e-3, 12.0)


@pytest.mark.parametrize("form", ["nested", "flat"])
def test_the_content_is_what_torch_converts_it_to(
    form: str, dcp_alone: Path, dcp_sharded: Path, tmp_path: Path
) -> None:
    for folder in (dcp_alone / form, dcp_sharded / form):
        assert same(tree(folder), object_of(folder))
        assert same(statecodec.load(folder), object_of(folder))
        packed = tmp_path / "packed.sc.safetensors"
        statecodec.compress(folder, packed, preset="lossless", force=True, verify=True)
        assert same(statecodec.load(packed), object_of(folder))


@pytest.mark.parametrize("packed", [False, True])
def test_it_becomes_one_torch_file(
    packed: bool, dcp_sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = dcp_sharded / "nested"
    if packed:
        statecodec.compress(source, tmp_path / "x.sc.safetensors", preset="lossless")
        source = tmp_path / "x.sc.safetensors"
    on_disk, in_memory = [], []
    monkeypatch.setattr(Spill, "take", lambda self, n: on_disk.append(n) or torch.empty(n, dtype=torch.uint8))
    monkeypatch.setattr(Memory, "take", lambda self, n: in_memory.append(n) or torch.empty(n, dtype=torch.uint8))
    monkeypatch.setattr(StoredCheckpoint, "decode", lambda self, item: pytest.fail("a whole item is in memory"))
    statecodec.convert(source, tmp_path / "one.pt", layout="torch")
    assert same(torch.load(tmp_path / "one.pt", weights_only=True), object_of(dcp_sharded / "nested"))
    assert on_disk.count(192 * 64 * 4) >= 3, "a weight and its moments are put together on disk"
    assert 96 * 64 * 4 not in on_disk + in_memory, "of their halves no copy is made"


def test_columns_are_put_together_as_well(tmp_path: Path) -> None:
    """Chunks that are not runs of rows."""
    whole = torch.randn(6, 8)
    folder = tmp_path / "columns"
    folder.mkdir()
    boxes = {(0, 0): whole[:, :3], (0, 3): whole[:4, 3:], (4, 3): whole[4:, 3:]}
    chunks, stored, content = [], {}, b""
    for (row, column), part in boxes.items():
        buffer = io.BytesIO()
        torch.save(part.clone(), buffer)
        offset = torch.Size((row, column))
        chunks.append(ChunkStorageMetadata(offset, part.size()))
        stored[MetadataIndex("w", offset)] = _StorageInfo("__0_0.distcp", len(content), len(buffer.getvalue()))
        content += buffer.getvalue()
    (folder / "__0_0.distcp").write_bytes(content)
    about = TensorStorageMetadata(TensorProperties(dtype=torch.float32), whole.size(), chunks)
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata({"w": about}, None, stored)))
    assert torch.equal(statecodec.load(folder)["w"], whole)
    packed = tmp_path / "packed.sc.safetensors"
    statecodec.compress(folder, packed, preset="lossless")
    for source in (folder, packed):
        statecodec.convert(source, tmp_path / "one.pt", layout="torch", force=True)
        assert torch.equal(torch.load(tmp_path / "one.pt", weights_only=True)["w"], whole)


def test_sharded_tensors_have_one_name_and_are_read_whole(dcp_sharded: Path, tmp_path: Path) -> None:
    packed = tmp_path / "x.sc.safetensors"
    statecodec.compress(dcp_sharded / "nested", packed, preset="lossless")
    state = object_of(dcp_sharded / "nested")
    for path in (dcp_sharded / "nested", packed):
        with statecodec.open(path) as checkpoint:
            names = checkpoint.names()
            assert {FC, "optimizer.state.emb.weight.exp_avg_sq"} <= set(names)
            assert not [name for name in names if "[" in name], "pieces are no tensors of their own"
            assert torch.equal(checkpoint.read(FC), state["model"]["fc.weight"])
            second = state["optimizer"]["state"]["emb.weight"]["exp_avg_sq"]
            assert torch.equal(checkpoint.read("optimizer.state.emb.weight.exp_avg_sq"), second)
            about = checkpoint.info(FC)
            assert (about["role"], about["param"], about["shape"]) == ("weight", "fc.weight", (192, 64))
            with pytest.raises(UsageError, match=r"pieces, each on its own|not compressed"):
                checkpoint.read_encoded(FC)


def test_every_byte_comes_back(dcp_sharded: Path, tmp_path: Path) -> None:
    statecodec.compress(dcp_sharded / "nested", tmp_path / "x.sc.safetensors", preset="lossless")
    statecodec.restore(tmp_path / "x.sc.safetensors", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(dcp_sharded / "nested")


def test_torch_reads_what_a_lossy_preset_restores(dcp_sharded: Path, tmp_path: Path) -> None:
    report = statecodec.compress(dcp_sharded / "flat", tmp_path / "x.sc.safetensors", verify=True)
    assert "raw" not in {t.codec for t in report.tensors if t.name.startswith("model.fc.weight")}
    assert report.num_params == sum(
        t.numel() for k, t in object_of(dcp_sharded / "flat")["model"].items() if k != "mask"
    )
    statecodec.restore(tmp_path / "x.sc.safetensors", tmp_path / "back")
    dcp_to_torch_save(tmp_path / "back", tmp_path / "back.pt")
    exact, back = object_of(dcp_sharded / "flat"), torch.load(tmp_path / "back.pt", weights_only=False)
    weight = exact["model"]["fc.weight"]
    assert (back["model"]["fc.weight"] - weight).norm() < 3e-4 * weight.norm()
    second = exact["optimizer"]["state.fc.weight.exp_avg_sq"]
    error = (back["optimizer"]["state.fc.weight.exp_avg_sq"] - second).abs()
    assert 0 < error.max() < 0.1 * second.max()
    for info in metadata(tmp_path / "back").storage_data.values():
        data = (tmp_path / "back" / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
        assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None, "a CRC is wrong"


def test_keys_as_megatron_writes_them(tmp_path: Path) -> None:
    """Saved by torch, under the names of Megatron's distributed optimizer (layers stacked on a leading axis)."""
    shape = (2, 6, 4)
    keys = ["exp_avg", "exp_avg_sq", "fp32_param"]
    state = {f"optimizer.state.{k}.decoder.layers.fc1.weight": torch.rand(shape) for k in keys}
    state["decoder.layers.fc1.weight"] = torch.rand(shape).bfloat16()
    torch_dcp.save(state, checkpoint_id=tmp_path / "iter")
    roles = {t.name: (t.role, t.param) for t in locate(tmp_path / "iter").tensors}
    param = "decoder.layers.fc1.weight"
    assert roles.pop(param) == ("weight", param)
    expected = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "fp32_param": "master"}
    assert roles == {f"optimizer.state.{k}.{param}": (role, param) for k, role in expected.items()}


def test_two_folders_under_one_root(dcp_sharded: Path, tmp_path: Path) -> None:
    """As FSDP1 through the Trainer: names begin with the folder, and what lies beside is carried."""
    root = tmp_path / "checkpoint-3"
    for name in ("model_0", "optimizer_0"):
        shutil.copytree(dcp_sharded / "nested", root / name)
    (root / "trainer_state.json").write_text("{}")
    source = locate(root)
    assert {f.layout for f in source.files} == {"dcp", "opaque"}
    assert {t.name.partition(":")[0] for t in source.tensors} == {"model_0", "optimizer_0"}
    content = tree(root)
    assert list(content) == ["model_0", "optimizer_0", "trainer_state.json"]
    assert same(content["model_0"], object_of(dcp_sharded / "nested"))


def test_one_shard_says_what_is_needed(dcp_sharded: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownLayout, match="one file of a DCP checkpoint"):
        locate(dcp_sharded / "nested" / "__1_0.distcp")
    with pytest.raises(UnknownLayout, match="one file of a DCP checkpoint"):
        locate(dcp_sharded / "nested" / ".metadata")
    shutil.copytree(dcp_sharded / "nested", tmp_path / "x")
    (tmp_path / "x" / ".metadata").unlink()
    source = locate(tmp_path / "x")
    assert [f.layout for f in source.files] == ["opaque", "opaque"]
    assert all("one file of a DCP checkpoint" in (f.note or "") for f in source.files)


# ---- folders that lie


def metadata(folder: Path) -> Any:
    return pickle.loads((folder / ".metadata").read_bytes())


def info_of(about: Any, key: str) -> Any:
    return next(info for index, info in about.storage_data.items() if index.fqn == key)


FC = "model.fc.weight"


def elsewhere(about: Any) -> None:
    info_of(about, FC).relative_path = "../../etc/passwd"


def absolute(about: Any) -> None:
    info_of(about, FC).relative_path = "/etc/passwd"


def itself(about: Any) -> None:
    info_of(about, FC).relative_path = ".metadata"


def past_the_end(about: Any) -> None:
    info_of(about, FC).length = 1 << 40


def negative(about: Any) -> None:
    info_of(about, FC).offset = -1


def another_item(about: Any) -> None:
    info_of(about, FC).offset = info_of(about, "model.ln.bias").offset


def the_same_bytes_twice(about: Any) -> None:
    first, second = (info_of(about, f"optimizer.state.fc.weight.{key}") for key in ("exp_avg", "exp_avg_sq"))
    first.offset, first.length = second.offset, second.length


def shifted(about: Any) -> None:
    info_of(about, FC).offset += 1
    info_of(about, FC).length -= 1


def forgotten(about: Any) -> None:
    del about.storage_data[next(i for i in about.storage_data if i.fqn == FC)]


def of_nothing(about: Any) -> None:
    del about.state_dict_metadata[FC]


def chunk_outside(about: Any) -> None:
    about.state_dict_metadata[FC].size = torch.Size((10, 8))


def hole(about: Any) -> None:
    about.state_dict_metadata[FC].size = torch.Size((25, 8))


def twice_the_same(about: Any) -> None:
    chunk = about.state_dict_metadata[FC].chunks[0]
    half = torch.Size((12, 8))
    about.state_dict_metadata[FC].chunks = [ChunkStorageMetadata(chunk.offsets, half) for _ in range(2)]


def huge(about: Any) -> None:
    about.state_dict_metadata[FC].size = torch.Size((1 << 40, 8))
    about.state_dict_metadata[FC].chunks = [ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((1 << 40, 8)))]


def another_dtype(about: Any) -> None:
    about.state_dict_metadata[FC].properties.dtype = torch.float64


def many_entangled_chunks(about: Any) -> None:
    about.state_dict_metadata[FC].size = torch.Size((1, 3000))
    chunks = [ChunkStorageMetadata(torch.Size((0, i)), torch.Size((1, 1))) for i in range(3000)]
    about.state_dict_metadata[FC].chunks = chunks


def far_index(about: Any) -> None:
    about.planner_data[FC] = ("model", 1 << 40)


def through_a_value(about: Any) -> None:
    about.planner_data[FC] = ("step", "x")


def long_path(about: Any) -> None:
    about.planner_data[FC] = ("x",) * 100_000


LIES: list[Callable[[Any], None]] = [
    elsewhere, absolute, itself, past_the_end, negative, another_item, the_same_bytes_twice, shifted, forgotten,
    of_nothing, chunk_outside, hole, twice_the_same, huge, another_dtype, many_entangled_chunks, far_index,
    through_a_value, long_path,
]  # fmt: skip


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_lies_are_errors_and_bytes_in_a_directory(lie: Callable[[Any], None], dcp_alone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    shutil.copytree(dcp_alone / "nested", folder)
    about = metadata(folder)
    lie(about)
    (folder / ".metadata").write_bytes(pickle.dumps(about))
    with pytest.raises(MalformedCheckpoint):
        dcp.locate(list_path(folder))
    with pytest.raises(MalformedCheckpoint):
        dcp.tree(list_path(folder), lambda *_: pytest.fail("payload was read"))
    source = locate(folder)
    assert source.tensors == ()
    assert [bool(f.note) for f in source.files] == [True, False]
    assert tree(folder)["__0_0.distcp"] == (folder / "__0_0.distcp").read_bytes()


def test_shards_that_overlap_and_leave_a_hole(dcp_sharded: Path, tmp_path: Path) -> None:
    """As many elements as the tensor has, each chunk whole and where it is said to be; only its place is a lie."""
    folder = tmp_path / "x"
    shutil.copytree(dcp_sharded / "nested", folder)
    about = metadata(folder)
    middle = torch.Size((48, 0))
    index = next(i for i in about.storage_data if i.fqn == FC and i.offset == torch.Size((96, 0)))
    about.storage_data[MetadataIndex(FC, middle)] = about.storage_data.pop(index)
    about.state_dict_metadata[FC].chunks[1].offsets = middle
    (folder / ".metadata").write_bytes(pickle.dumps(about))
    with pytest.raises(MalformedCheckpoint, match="not the whole of it, once"):
        dcp.locate(list_path(folder))


def test_a_missing_and_a_short_shard_are_named(dcp_sharded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    shutil.copytree(dcp_sharded / "nested", folder)
    shard = folder / "__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(MalformedCheckpoint, match=r"__1_0\.distcp has"):
        dcp.locate(list_path(folder))
    shard.unlink()
    with pytest.raises(MalformedCheckpoint, match=r"'__1_0\.distcp', which is no shard in the folder"):
        dcp.locate(list_path(folder))


def test_a_shard_of_another_checkpoint_is_no_wrong_tensor(dcp_alone: Path, dcp_sharded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    shutil.copytree(dcp_sharded / "nested", folder)
    shutil.copy(folder / "__0_0.distcp", folder / "__1_0.distcp")
    with pytest.raises(MalformedCheckpoint):
        dcp.locate(list_path(folder))


class Runs:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_nothing_of_the_metadata_is_run(dcp_alone: Path, tmp_path: Path) -> None:
    folder, marker = tmp_path / "x", tmp_path / "executed"
    shutil.copytree(dcp_alone / "nested", folder)
    about = metadata(folder)
    about.planner_data["evil"] = Runs(f"touch {marker}")
    (folder / ".metadata").write_bytes(pickle.dumps(about))
    assert locate(folder).tensors
    tree(folder)
    (folder / ".metadata").write_bytes(pickle.dumps(Runs(f"touch {marker}")))
    with pytest.raises(LayoutError):
        dcp.locate(list_path(folder))
    assert not marker.exists()


def test_compressed_items_stay_bytes(dcp_alone: Path, tmp_path: Path) -> None:
    """A storage extension transforms items in ways that only it undoes."""
    folder = tmp_path / "x"
    shutil.copytree(dcp_alone / "nested", folder)
    about = metadata(folder)
    info_of(about, FC).transform_descriptors = ["zstd"]
    (folder / ".metadata").write_bytes(pickle.dumps(about))
    source = locate(folder)
    check_located(source, contents(folder))
    assert FC not in {t.name for t in source.tensors}
    assert "model.fc.bias" in {t.name for t in source.tensors}
