"""StatecodecWriter and StatecodecReader in one process: what is stored, what is read, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

import statecodec
from statecodec.codecs import chunking
from statecodec.distributed import INDEX, dcp_index
from statecodec.distributed.folders import Directory
from statecodec.distributed.reader import StatecodecReader
from statecodec.distributed.writer import StatecodecWriter
from statecodec.errors import FormatError, PolicyError, UsageError
from statecodec.format import Reader
from tests.contracts.layout import same
from tests.distributed.one_process import load, rank_files, save, state

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.mark.parametrize("optimizer", ["torch", "statecodec"])
def test_one_process_and_states_that_are_encoded_already(optimizer: str, tmp_path: Path) -> None:
    value = state(optimizer=optimizer)
    save(value, tmp_path / "ckpt", preset="lossless")
    assert same(load(tmp_path / "ckpt", state(1, optimizer)), value)


def test_encoded_states_are_kept_bit_for_bit_whatever_the_preset(tmp_path: Path) -> None:
    value = state(optimizer="statecodec")
    save(value, tmp_path / "ckpt")
    assert same(load(tmp_path / "ckpt", state(1, "statecodec"))["optim"], value["optim"])


def test_averages_are_stored_beside_their_weights_and_load_without_them(tmp_path: Path) -> None:
    value = state()
    value["ema"] = {k: w + 1e-3 * torch.randn_like(w) for k, w in value["model"].items()}
    save(value, tmp_path / "ckpt", preset="small")
    (file,) = rank_files(tmp_path / "ckpt")
    assert {t.codec.partition("(")[0] for t in statecodec.inspect(file).tensors if t.role == "ema"} == {
        "following", "raw",
    }  # fmt: skip
    like = {"ema": {k: torch.zeros_like(w) for k, w in value["ema"].items()}}
    found = load(tmp_path / "ckpt", like)["ema"]["0.weight"]
    assert 0 < float((found - value["ema"]["0.weight"]).square().mean().sqrt()) < 3e-4, "three tenths of lr"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base": "x"}, "takes no base"),
        ({"force": False}, "takes no force"),
        ({"colour": 1}, "takes no colour"),
        ({"preset": "huge"}, "huge"),
    ],
)
def test_settings_are_refused_when_a_writer_is_made(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    StatecodecWriter(tmp_path, preset="small", verify=True, device="cpu", threads=1)
    with pytest.raises((UsageError, PolicyError), match=message):
        StatecodecWriter(tmp_path, **settings)


def test_every_file_is_a_compressed_checkpoint(tmp_path: Path) -> None:
    save(state(), tmp_path / "ckpt")
    (file,) = rank_files(tmp_path / "ckpt")
    report = statecodec.verify(file)
    assert {t.role for t in report.tensors} >= {"weight", "exp_avg", "exp_avg_sq", "step"}


def test_verbs_say_what_the_folder_is_and_what_reads_it(tmp_path: Path) -> None:
    folder, one = tmp_path / "ckpt", tmp_path / "x.pt"
    save(state(), folder)
    (file,) = rank_files(folder)
    torch.save({"w": torch.ones(3)}, one)
    verbs = [statecodec.inspect, statecodec.load, statecodec.open, statecodec.restore, statecodec.verify]
    calls = [lambda verb=verb: verb(folder) for verb in verbs]
    calls += [
        lambda: statecodec.compress(folder),
        lambda: statecodec.convert(folder, tmp_path / "y.pt", layout="torch"),
        lambda: statecodec.diff(one, folder),
        lambda: statecodec.analyze(folder),
    ]
    for call in calls:
        with pytest.raises(FormatError, match=r"StatecodecWriter wrote.*StatecodecReader\('.*ckpt'\).*" + file.name):
            call()
    (folder / INDEX).write_text("{}")
    assert statecodec.inspect(folder).source["layout"] == "directory", "the name alone says nothing"


def test_a_rank_decodes_only_the_chunks_that_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking.iterate, "__defaults__", (4096,))
    monkeypatch.setattr(chunking.chunks, "__defaults__", (4096,))
    value = {"w": torch.randn(1000, 64)}
    save(value, tmp_path / "ckpt", preset="lossless")
    read: list[int] = []
    real = Reader.read_chunk

    def counted(self: Reader, item: int, chunk: int, *rest: Any) -> Any:
        read.append(chunk)
        return real(self, item, chunk, *rest)

    monkeypatch.setattr(Reader, "read_chunk", counted)
    part = {"w": torch.zeros(1000, 64)[900:910]}
    reader = StatecodecReader(tmp_path / "ckpt")
    metadata = reader.read_metadata()
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.metadata import MetadataIndex
    from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

    planner = DefaultLoadPlanner()
    planner.set_up_planner(part, metadata, True)
    reader.set_up_storage_reader(metadata, True)
    index, zero = MetadataIndex("w", torch.Size([0, 0])), torch.Size([0, 0])
    item = ReadItem(
        LoadItemType.TENSOR, MetadataIndex("w", zero), zero, index, torch.Size([900, 0]), torch.Size([10, 64])
    )
    reader.read_data(LoadPlan([item]), planner).wait()
    assert torch.equal(part["w"], value["w"][900:910])
    assert len(read) == 1


def test_damage_names_the_file_and_the_tensor(tmp_path: Path) -> None:
    save(state(), tmp_path / "ckpt")
    (file,) = rank_files(tmp_path / "ckpt")
    with Reader(file) as reader:
        item = reader.index("model.0.weight")
        header, stored = reader._headers[0], reader.items[item]
        place = header.data + header.entries[stored.entry].start + stored.start
    data = bytearray(file.read_bytes())
    data[place + 100] ^= 1
    file.write_bytes(data)
    with pytest.raises(dcp.api.CheckpointException, match=rf"(?s){file.name}.*model\.0\.weight.*checksum"):
        load(tmp_path / "ckpt", state(1))


def test_a_file_of_another_save_is_refused(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        save(state(seed), tmp_path / name)
    (a,), (b,) = rank_files(tmp_path / "a"), rank_files(tmp_path / "b")
    a.write_bytes(b.read_bytes())
    with pytest.raises(dcp.api.CheckpointException, match="of another save"):
        load(tmp_path / "a", state(2))


def test_a_save_that_dies_leaves_the_checkpoint_before_and_the_next_one_sweeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = state(0), state(1)
    save(first, tmp_path / "ckpt", preset="lossless")
    with monkeypatch.context() as patch:
        patch.setattr(dcp_index, "to_bytes", lambda *_: 1 / 0)  # after the ranks wrote, before the index
        with pytest.raises(dcp.api.CheckpointException):
            save(second, tmp_path / "ckpt", preset="lossless")
    assert len(rank_files(tmp_path / "ckpt")) == 2
    assert same(load(tmp_path / "ckpt", state(2)), first)
    save(second, tmp_path / "ckpt", preset="lossless")
    assert len(rank_files(tmp_path / "ckpt")) == 1
    assert same(load(tmp_path / "ckpt", state(2)), second)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(dcp.api.CheckpointException, match="no checkpoint was completed"):
        load(tmp_path, state())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index")
    save(state(), folder)
    return folder / INDEX


@settings(max_examples=200)
@given(data=st.data())
def test_a_lying_index_is_an_error_of_ours(index: Path, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    value = json.loads(index.read_text())
    node, path = value, []
    while isinstance(node, (dict, list)) and node and (not path or data.draw(st.booleans())):
        path.append(data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node)))))
        parent, node = node, node[path[-1]]
    parent[path[-1]] = data.draw(JSON)
    folder = tmp_path_factory.getbasetemp() / "lying"
    folder.mkdir(exist_ok=True)
    (folder / INDEX).write_text(json.dumps(value))
    try:
        dcp_index.read(Directory(folder))
    except FormatError:
        return
