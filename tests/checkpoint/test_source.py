"""An open source checkpoint: the same files all along, records checked once, names as reports print them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import statecodec
from statecodec.checkpoint import source_files
from statecodec.checkpoint.source import SourceCheckpoint
from statecodec.errors import LayoutError, MalformedCheckpoint


def saved(path: Path, value: float = 1.0, count: int = 3) -> Path:
    """A checkpoint of a few tensors of 10,000 elements."""
    torch.save({f"layer.{i}.weight": torch.full((100, 100), value + i) for i in range(count)}, path)
    return path


def swapped(path: Path) -> None:
    """Another file of the same size under the same name, with the same time of change."""
    before = path.stat()
    other = saved(path.with_name("swap.pt"), 5.0)
    assert other.stat().st_size == before.st_size
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


def test_a_replaced_file_is_noticed_when_it_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "ckpt.pt")
    with SourceCheckpoint(path) as checkpoint:
        swapped(path)
        with pytest.raises(LayoutError, match="changed while it was being read"):
            checkpoint.decode(1)


def test_a_file_replaced_while_it_is_compressed_leaves_no_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, target = saved(tmp_path / "ckpt.pt"), tmp_path / "ckpt.sc.safetensors"
    chunk = SourceCheckpoint.chunk
    replaced: list[bool] = []

    def read(self: SourceCheckpoint, *args: object) -> torch.Tensor:
        values = chunk(self, *args)  # type: ignore[arg-type]
        if not replaced:
            replaced.append(True)
            swapped(path)
        return values

    monkeypatch.setattr(SourceCheckpoint, "chunk", read)
    with pytest.raises(LayoutError, match="changed while it was being read"):
        statecodec.compress(path, target)
    assert not target.exists()


def damaged(tmp_path: Path) -> Path:
    """A checkpoint with one flipped bit in a weight, which torch.load does not notice."""
    path = saved(tmp_path / "damaged.pt")
    data = bytearray(path.read_bytes())
    at = data.index(torch.full((4,), 2.0).numpy().tobytes())
    data[at + 3] ^= 0x20
    path.write_bytes(data)
    torch.load(path)
    return path


READERS: dict[str, Callable[[Path, Path], object]] = {
    "compress": lambda path, _: statecodec.compress(path),
    "load": lambda path, _: statecodec.load(path),
    "diff": statecodec.diff,
    "convert": lambda path, _: statecodec.convert(path, path.with_name("out.sc.safetensors"), "weight=cast"),
    "read": lambda path, _: statecodec.open(path).read("layer.1.weight"),
}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_refuses_a_record_that_fails_its_crc(reader: str, tmp_path: Path) -> None:
    path, sound = damaged(tmp_path), saved(tmp_path / "sound.pt")
    with pytest.raises(MalformedCheckpoint, match="CRC-32"):
        READERS[reader](path, sound)


def test_other_tensors_of_a_damaged_file_can_be_read(tmp_path: Path) -> None:
    with statecodec.open(damaged(tmp_path)) as checkpoint:
        assert torch.equal(checkpoint.read("layer.2.weight"), torch.full((100, 100), 3.0))


def test_a_directory_of_more_files_than_are_kept_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_files, "_OPEN_FILES", 2)
    folder = tmp_path / "run"
    folder.mkdir()
    for i in range(7):
        saved(folder / f"{i}.pt", float(i))
    before = len(os.listdir("/proc/self/fd"))
    with SourceCheckpoint(folder) as checkpoint:
        for _ in range(2):
            for item in checkpoint.items:
                checkpoint.decode(item.index)
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert len(os.listdir("/proc/self/fd")) == before


def test_names_that_reports_print_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    value = {"model": {"encoder/layer.0/w": torch.randn(80, 80), "b": torch.randn(3)}}
    torch.save(value, path)
    report = statecodec.compress(path, tmp_path / "ckpt.sc.safetensors", preset="lossless")
    for opened in (path, report.path):
        with statecodec.open(opened) as checkpoint:
            for tensor in statecodec.inspect(opened).tensors:
                if tensor.role not in ("skeleton", "file"):
                    assert list(checkpoint.read(tensor.name).shape) == list(tensor.shape)
            assert torch.equal(checkpoint.read("model.encoder/layer.0/w"), value["model"]["encoder/layer.0/w"])


def test_a_vanished_file_is_an_error_of_ours(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    saved(folder / "a.pt")
    with SourceCheckpoint(folder) as checkpoint:
        shutil.rmtree(folder)
        with pytest.raises(LayoutError, match="cannot be read any more"):
            checkpoint.decode(1)
