"""Checkpoints in stores: fsspec's file systems and obstore's stores, with the promises of a directory."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp

from statecodec import staging
from statecodec.distributed import INDEX, StatecodecReader, StatecodecWriter, dcp_index, stores
from statecodec.distributed.folders import InStore, folder_at
from statecodec.errors import OutputFailed, UsageError
from tests.contracts.layout import same
from tests.distributed.one_process import load, rank_files, save, state
from tests.forks import forks
from tests.s3_server import bucket_store, s3_server

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
obstore = pytest.importorskip("obstore") if sys.version_info >= (3, 11) else None
# s3fs asks for another botocore than moto's: who installs it beside the environment runs that, too.
KINDS = ["memory://", "file://", "fsspec", *(["obstore", "obstore, local", "s3"] if obstore else [])]
KINDS += ["s3fs"] if find_spec("s3fs") else []


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server("checkpoints") as url:
        yield url


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """The arguments of writers and readers for a kind of store. The memory of fsspec is all processes' one store."""
    yield _arguments(request, tmp_path)
    fsspec.filesystem("memory").store.clear()


def _arguments(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    kind = request.param
    if kind == "fsspec":
        return {"folder": str(tmp_path / "run" / "7"), "store": fsspec.filesystem("file")}
    if kind == "s3":
        return {"folder": "run/7", "store": bucket_store(request.getfixturevalue("s3"), "checkpoints")}
    if kind == "s3fs":
        url = request.getfixturevalue("s3")
        return {
            "folder": "checkpoints/s3fs/7",
            "store": fsspec.filesystem("s3", endpoint_url=url, key="test", secret="test"),
        }
    if kind == "obstore":
        return {"folder": "run/7", "store": obstore.store.MemoryStore()}
    if kind == "obstore, local":
        return {"folder": "/run/7/", "store": obstore.store.LocalStore(tmp_path)}
    return {"folder": f"{kind}{tmp_path}/run 7[1]*"}  # what is a pattern elsewhere is a name here


@pytest.mark.parametrize("place", KINDS, indirect=True)
def test_a_store_keeps_what_a_directory_keeps(place: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A round trip, a save that fails before its index, one that follows it, and damage."""
    where = folder_at(place["folder"], place.get("store"))
    with pytest.raises(dcp.api.CheckpointException, match="no checkpoint was completed"):
        load(like=state(9), **place)
    first, second = state(0), state(1)
    save(first, **place, preset="lossless")
    assert same(load(like=state(9), **place), first)
    with monkeypatch.context() as patch:
        patch.setattr(dcp_index, "to_bytes", lambda *_: 1 / 0)  # after the ranks wrote, before the index
        with pytest.raises(dcp.api.CheckpointException):
            save(second, **place, preset="lossless")
    assert len(where.names()) == 3
    assert same(load(like=state(9), **place), first)
    save(second, **place, preset="lossless")
    file, index = sorted(where.names())
    assert index == INDEX
    assert same(load(like=state(9), **place), second)
    where.remove(file)
    with pytest.raises(dcp.api.CheckpointException, match=file):
        load(like=state(9), **place)


@pytest.mark.parametrize("place", ["memory://", *(["obstore"] if obstore else [])], indirect=True)
def test_a_rank_reads_the_ranges_that_it_needs(place: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """4 of 64 MB: what else comes is the manifest, and what a request brings at least."""
    where = folder_at(place["folder"], place.get("store"))
    assert isinstance(where, InStore)
    save({"w": torch.randn(16_000, 1000)}, **place, preset="lossless", rules=["w=raw"], pack="none")
    read: list[int] = []
    real = type(where._objects).read

    def counted(self: Any, key: str, start: int, stop: int) -> bytes:
        if not key.endswith(INDEX):
            read.append(stop - start)
        return real(self, key, start, stop)

    monkeypatch.setattr(type(where._objects), "read", counted)
    part = torch.zeros(16_000, 1000)[:1000]
    reader = StatecodecReader(place["folder"], store=place.get("store"))
    one_box(reader, part)
    assert part.any(1).all()
    assert part.nbytes <= sum(read) < part.nbytes + 4 * (1 << 20)


def one_box(reader: StatecodecReader, part: torch.Tensor) -> None:
    """Read the first rows of `w`, as a rank of a sharded load does."""
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.metadata import MetadataIndex
    from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

    metadata, planner = reader.read_metadata(), DefaultLoadPlanner()
    planner.set_up_planner({"w": part}, metadata, True)
    reader.set_up_storage_reader(metadata, True)
    zero = torch.Size([0, 0])
    index = MetadataIndex("w", zero)
    reader.read_data(LoadPlan([ReadItem(LoadItemType.TENSOR, index, zero, index, zero, part.shape)]), planner).wait()


# --- a process that is killed while it saves


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_while_it_writes(folder: str) -> None:
    """In the middle of a rank's file."""
    staging.StagedFile.finish = die  # type: ignore[method-assign]
    save(state(1), folder)


def killed_while_it_uploads(folder: str) -> None:
    """Half of a rank's file is there."""

    def half(self: Any, path: Path, key: str) -> None:
        Path(key).write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        die()

    stores.Fsspec.upload = half  # type: ignore[method-assign]
    save(state(1), folder, store=fsspec.filesystem("file"))


def killed_while_it_writes_the_index(folder: str) -> None:
    """Half of the index is there, under another name."""
    system = fsspec.filesystem("file")

    def half(path: str, value: bytes) -> None:
        Path(path).write_bytes(value[: len(value) // 2])
        die()

    system.pipe_file = half
    save(state(1), folder, store=system)


def test_a_killed_save_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    kills = [killed_while_it_writes, killed_while_it_uploads, killed_while_it_writes_the_index]
    first, context = state(0), forks()
    processes = []
    for kill in kills:
        save(first, tmp_path / kill.__name__, preset="lossless")
        processes.append(context.Process(target=kill, args=(str(tmp_path / kill.__name__),)))
        processes[-1].start()
    for kill, process in zip(kills, processes, strict=True):
        process.join()
        assert process.exitcode == -signal.SIGKILL, kill.__name__
        folder = tmp_path / kill.__name__
        assert len(list(folder.iterdir())) == 3 + (kill is killed_while_it_writes_the_index), kill.__name__
        assert same(load(folder, state(9)), first), kill.__name__
        save(state(2), folder, preset="lossless")
        assert sorted(folder.iterdir()) == [*rank_files(folder), folder / INDEX]
        assert same(load(folder, state(9)), state(2)), kill.__name__


# --- what is refused


@pytest.mark.parametrize(
    ("path", "store", "message"),
    [("nothing-known://a/b", None, "nothing-known"), ("a/b", object(), "an fsspec file system or an obstore store")],
)
def test_what_no_library_opens_is_refused(path: str, store: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        folder_at(path, store)


def test_failures_of_a_store_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    system = fsspec.filesystem("memory")
    folder = folder_at("memory://failing")
    monkeypatch.setattr(system, "pipe_file", lambda *_: 1 / 0, raising=False)
    with pytest.raises(OutputFailed, match=r"cannot write memory://.*failing/x: ZeroDivisionError"):
        folder.write("x", b"")
    with pytest.raises(UsageError, match="every rank writes one file"):
        StatecodecWriter("x", max_shard_size="1GB")
    with pytest.raises(UsageError, match="a folder stands alone"):
        StatecodecWriter("x", base="rank-0.sc.safetensors")
    assert str(folder_at("memory://a/b", system)) == str(folder_at("memory://a/b")) == "memory:///a/b"


def test_an_index_that_cannot_be_read_once_fails_the_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would read it again, on this rank alone, which then goes on without the others."""
    save(state(0), tmp_path)
    read, calls = dcp_index.read, 0

    def failing(folder: Any) -> dcp_index.FolderIndex:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OSError("the store does not answer")
        return read(folder)

    monkeypatch.setattr(dcp_index, "read", failing)
    with pytest.raises(dcp.api.CheckpointException, match="does not answer"):
        load(tmp_path, state(1))
    assert calls == 1
