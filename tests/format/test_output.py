"""Nothing is visible until it is whole, nothing is left when it fails, and what was there before is not lost."""

from __future__ import annotations

import errno
import os
import random
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from statecodec.codecs import Codec, Encoding, Raw
from statecodec.dtypes import FLOAT32, of
from statecodec.errors import OutputExists, OutputFailed, UsageError
from statecodec.format import ItemSpec, Reader, Writer
from tests.forks import forks
from tests.format.support import write

SIZES = [None, 60_000]
KILLS = int(os.environ.get("STATECODEC_KILLS", "2"))  # `make campaign` does many more


def tensors(value: float = 1.0) -> dict[str, tuple[Tensor, Codec]]:
    return {f"t{i}": (torch.randn(100, 100) + value, Raw()) for i in range(4)}


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def contents(path: Path) -> dict[str, Tensor]:
    with Reader(path) as reader:
        return {item.name: reader.read(item.name).parts["data"] for item in reader.items}


def same(a: dict[str, Tensor], b: dict[str, tuple[Tensor, Codec]]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k][0]) for k in b)


@pytest.mark.parametrize("shard", SIZES)
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_nothing_is_left_of_an_unfinished_output(tmp_path: Path, shard: int | None, error: type | None) -> None:
    def run() -> None:
        items = [ItemSpec(f"t{i}", Encoding(Raw()), (100, 100), FLOAT32) for i in range(4)]
        with Writer(tmp_path / "x", items, max_shard_size=shard) as writer:
            assert not (tmp_path / "x").exists()
            writer.append(writer.pack(0, writer.chunks(0)[0], {"data": torch.ones(100, 100)}))
            if error:
                raise error
            writer.abort()
            with pytest.raises(UsageError, match="closed"):
                writer.close({})

    if error:
        with pytest.raises(error):
            run()
    else:
        run()
    assert names(tmp_path) == []


@pytest.mark.parametrize("shard", SIZES)
def test_an_existing_output_is_kept_without_force_and_replaced_with_it(tmp_path: Path, shard: int | None) -> None:
    old, new = tensors(), tensors(2)
    path = write(tmp_path / "x.safetensors", old, max_shard_size=shard).path
    before = names(tmp_path)
    with pytest.raises(OutputExists):
        write(tmp_path / "x.safetensors", new, max_shard_size=shard)
    assert names(tmp_path) == before
    assert same(contents(path), old)
    write(tmp_path / "x.safetensors", new, max_shard_size=shard, force=True)
    assert names(tmp_path) == before
    assert same(contents(path), new)


@pytest.mark.parametrize(("first", "then"), [(None, 60_000), (60_000, None), (60_000, 30_000)])
def test_force_leaves_no_rest_of_an_output_cut_otherwise(tmp_path: Path, first: int | None, then: int | None) -> None:
    write(tmp_path / "x.safetensors", tensors(), max_shard_size=first)
    new = tensors(2)
    foreign = tmp_path / "x-00009-of-00009.safetensors"
    foreign.write_bytes(b"somebody else's")
    written = write(tmp_path / "x.safetensors", new, max_shard_size=then, force=True)
    assert names(tmp_path) == sorted({*(f.name for f in written.files), written.path.name, foreign.name})
    assert same(contents(tmp_path / "x.safetensors"), new)


def test_an_output_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with Writer(path, []) as writer:
        path.write_text("theirs")
        with pytest.raises(OutputExists):
            writer.close({})
    assert path.read_text() == "theirs"
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("shard", SIZES)
def test_a_finished_output_can_be_read_before_it_is_published(tmp_path: Path, shard: int | None) -> None:
    old, new = tensors(), tensors(2)
    path = write(tmp_path / "x.safetensors", old, max_shard_size=shard).path
    before = names(tmp_path)
    items = [ItemSpec(k, Encoding(c), tuple(t.shape), of(t.dtype)) for k, (t, c) in new.items()]
    for keep in (False, True):
        with Writer(tmp_path / "x.safetensors", items, max_shard_size=shard, force=True) as writer:
            for i, (tensor, _) in enumerate(new.values()):
                writer.append(writer.pack(i, writer.chunks(i)[0], {"data": tensor}))
            finished = writer.finish({})
            reader = finished.reader
            assert [check.error for check in reader.verify()] == [None] * 4
            assert [f.name for f in reader.files] == [f.name for f in finished.files]
            assert same(contents(finished.path), new)
            assert same(contents(path), old), "the previous output is there until the new one is published"
            if keep:
                assert finished.publish().path == path
        assert names(tmp_path) == before
        assert same(contents(path), new if keep else old)


def test_permissions(tmp_path: Path) -> None:
    path = tmp_path / "x"
    old = os.umask(0o027)
    try:
        write(path, tensors())
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o604)
    write(path, tensors(), force=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o604
    written = write(tmp_path / "y", tensors(), max_shard_size=60_000)
    written.path.chmod(0o600)
    written = write(tmp_path / "y", tensors(), max_shard_size=60_000, force=True)
    assert {stat.S_IMODE(f.stat().st_mode) for f in (*written.files, written.path)} == {0o600}


def test_links_devices_and_directories(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    write(tmp_path / "real" / "x", tensors())
    (tmp_path / "link").symlink_to(tmp_path / "real" / "x")
    new = tensors(2)
    write(tmp_path / "link", new, force=True)
    assert (tmp_path / "link").is_symlink()
    assert same(contents(tmp_path / "real" / "x"), new)
    os.mkfifo(tmp_path / "fifo")
    for wrong in (tmp_path / "real", tmp_path / "fifo"):
        with pytest.raises(UsageError, match="not a regular file"):
            write(wrong, new, force=True)
    with pytest.raises(OutputFailed, match="no directory"):
        write(tmp_path / "none" / "x", new)


@pytest.mark.parametrize("shard", SIZES)
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("call", ["open", "pwrite", "ftruncate", "fsync", "link", "replace", "rename"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: int | None, force: bool, call: str, code: int
) -> None:
    """The n-th call fails, for every n: OutputFailed; what is visible then is whole, or nothing."""
    at_once, moved = force and shard is None, force and shard is not None
    if (call == "replace" and not at_once) or (call == "link" and at_once) or (call == "rename" and not moved):
        return  # never made
    real: Callable[..., Any] = getattr(os, call)
    path, old, new = tmp_path / "x.safetensors", tensors(), tensors(2)
    for n in range(100):
        if force:
            write(path, old, max_shard_size=shard, force=True)
        calls = iter(range(1000))

        def failing(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == n:  # noqa: B023
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            try:
                write(path, new, max_shard_size=shard, force=force)
                break
            except OutputFailed:
                pass
        left = names(tmp_path)
        assert not any(name.endswith(".tmp") for name in left)
        assert force or not left, left
        if force:
            found = contents(path)
            assert same(found, old) or same(found, new)
    assert 0 < n < 99, "the call was never made, or it never succeeded"
    assert same(contents(path), new)


def test_a_temporary_name_that_cannot_be_removed_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = tensors()

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.EIO, "no")

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", failing)
        write(tmp_path / "x", values)
    assert same(contents(tmp_path / "x"), values)
    assert len(names(tmp_path)) == 2
    write(tmp_path / "x", values, force=True)
    assert names(tmp_path) == ["x"]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, memoryview(data)[:1000], at))
    values = tensors()
    write(tmp_path / "x", values)
    monkeypatch.undo()
    assert same(contents(tmp_path / "x"), values)


def write_until_killed(ready: Any, place: Path, shard: int | None) -> None:
    torch.set_num_threads(1)
    tensors = {f"t{i}": (torch.randn(400, 400), Raw()) for i in range(4)}
    write(place / "warm", tensors, max_shard_size=shard)
    ready.set()
    for i in range(1000):
        write(place / f"x{i}.safetensors", tensors, max_shard_size=shard)


@pytest.mark.parametrize("shard", [0, 700_000])
def test_kill_at_any_moment(tmp_path: Path, shard: int) -> None:
    """After SIGKILL every visible output is whole; the next writer of that name removes what the killed one left."""
    rng = random.Random(shard)
    context = forks()
    for attempt in range(KILLS):
        place = tmp_path / str(attempt)
        place.mkdir()
        ready = context.Event()
        child = context.Process(target=write_until_killed, args=(ready, place, shard or None), daemon=True)
        child.start()
        assert ready.wait(100)
        time.sleep(rng.uniform(0.0, 0.3))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        found = names(place)
        whole = (
            [n for n in found if n.endswith(".index.json")]
            if shard
            else [n for n in found if n.endswith(".safetensors")]
        )
        for name in whole:
            with Reader(place / name) as reader:
                assert [c.error for c in reader.verify()] == [None] * 4
        for name in found:
            if name.endswith(".tmp"):
                write(
                    place / name[1 : -len(".0123456789abcdef.tmp")], tensors(), max_shard_size=shard or None, force=True
                )
        assert not [name for name in names(place) if name.endswith(".tmp")]


def test_a_living_writer_s_files_are_not_swept(tmp_path: Path) -> None:
    with Writer(tmp_path / "x", []) as slow:
        mine = names(tmp_path)
        write(tmp_path / "x", tensors())
        assert names(tmp_path) == sorted([*mine, "x"])
        with pytest.raises(OutputExists):
            slow.close({})
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("packing", ["zstd", "none"])
def test_parts_may_be_parameters_that_are_trained(packing: str, tmp_path: Path) -> None:
    x = torch.randn(100, 100, requires_grad=True)
    with Writer(tmp_path / "x", [ItemSpec("x", Encoding(Raw()), (100, 100), FLOAT32)], packing=packing) as writer:
        writer.append(writer.pack(0, writer.chunks(0)[0], {"data": x}))
        writer.close()
    assert torch.equal(contents(tmp_path / "x")["x"], x.detach())
