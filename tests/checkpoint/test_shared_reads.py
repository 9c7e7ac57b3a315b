"""Hashing what was read for encoding: the digests of hashlib, whatever order the reads come in."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import statecodec
from statecodec.buffers import ThreadScratch, memory
from statecodec.checkpoint import digests
from statecodec.checkpoint.digests import FileHashes, FileToHash
from statecodec.checkpoint.shared_reads import SharedReads
from statecodec.checkpoint.source import SourceCheckpoint
from statecodec.codecs import Raw
from statecodec.codecs.chunking import iterate


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tensors of several chunks, of one, and one that its codec refuses once some of it has been read."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("shared") / "ckpt.pt"
    refused = torch.randn(1_300_000)
    refused[-1] = torch.nan
    torch.save({"a": torch.randn(1_200_000), "b": refused, "c": torch.randn(300, 50), "d": torch.arange(9)}, path)
    return path


@pytest.mark.parametrize("threads", [1, 3])
def test_the_digest_is_that_of_the_file(threads: int, source: Path, tmp_path: Path) -> None:
    report = statecodec.compress(
        source, tmp_path / "c.sc.safetensors", threads=threads, rules=["*:fp32=uniform(step=0.001)"], sha256=True
    )
    assert [t.name for t in report.tensors if t.codec == "raw" and t.name == "b"] == ["b"]
    assert report.source["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()


def read_alone(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the bytes that the hasher reads by itself."""
    counts, read = Counter[str](), digests.read_exactly

    def counting(fd: int, offset: int, target: memoryview, name: str) -> None:
        counts["bytes"] += len(target)
        read(fd, offset, target, name)

    monkeypatch.setattr(digests, "read_exactly", counting)
    return counts


def test_what_was_read_in_order_is_not_read_again(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = read_alone(monkeypatch)
    with SourceCheckpoint(source) as checkpoint:
        shared, scratch = SharedReads(checkpoint), ThreadScratch()
        hashes = FileHashes([FileToHash(source, source.stat().st_size)], shared=shared)
        hashes.start()
        for item in checkpoint.items:
            for chunk in iterate(Raw(), item.shape, item.dtype):
                shared.chunk_with_memory(item, chunk, scratch)
                while any(not loan.returned for *_, loan in list(shared._waiting)):
                    time.sleep(0.001)
        assert hashes.digests() == [hashlib.sha256(source.read_bytes()).hexdigest()]
        assert counts["bytes"] == checkpoint.items[0].nbytes  # what is between the tensors


@pytest.mark.parametrize("ahead", [4, 8])
def test_an_encoder_that_was_too_fast_lends_again(ahead: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What went by while all buffers were lent is read again, and nothing else."""
    path = tmp_path / "many.pt"
    torch.save({str(i): torch.full((4096,), float(i)) for i in range(40)}, path)
    counts = read_alone(monkeypatch)
    with SourceCheckpoint(path) as checkpoint:
        shared, scratch = SharedReads(checkpoint), ThreadScratch()
        hashes = FileHashes([FileToHash(path, path.stat().st_size)], shared=shared)
        jobs = [(item, c) for item in checkpoint.items[1:] for c in iterate(Raw(), item.shape, item.dtype)]
        for item, chunk in jobs[:ahead]:
            shared.chunk_with_memory(item, chunk, scratch)
        hashes.start()
        for item, chunk in jobs[ahead:]:
            while any(not loan.returned for *_, loan in list(shared._waiting)):
                time.sleep(0.001)
            shared.chunk_with_memory(item, chunk, scratch)
        assert hashes.digests() == [hashlib.sha256(path.read_bytes()).hexdigest()]
        assert counts["bytes"] == checkpoint.items[0].nbytes + (ahead - 3) * 4 * 4096


def test_what_is_read_twice_or_late_is_given_back(tmp_path: Path) -> None:
    """A tensor whose codec refused it, and a chunk of a file that is hashed already."""
    for name in ("a", "b"):
        torch.save({name: torch.randn(4096)}, tmp_path / f"{name}.pt")
    with SourceCheckpoint(tmp_path) as checkpoint:
        shared, scratch = SharedReads(checkpoint), ThreadScratch()
        first, second = (item for item in checkpoint.items if item.shape == (4096,))
        (chunk,) = iterate(Raw(), first.shape, first.dtype)
        shared.chunk_with_memory(first, chunk, scratch)
        shared.chunk_with_memory(first, chunk, scratch)
        loans = [loan for *_, loan in shared._waiting]
        assert second.region is not None
        shared.take(second.file, second.region.offset - 1)
        assert all(loan.returned for loan in loans)


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(6)), left=st.integers(0, 6))
def test_reads_in_any_order_give_the_same_digest(order: list[int], left: int, source: Path) -> None:
    """Some of the chunks are read in any order, the others not at all."""
    with SourceCheckpoint(source) as checkpoint:
        jobs = [(item, c) for item in checkpoint.items for c in iterate(Raw(), item.shape, item.dtype)]
        assert len(jobs) == 7
        shared, scratch = SharedReads(checkpoint), ThreadScratch()
        located = checkpoint.located.files[0]
        hashes = FileHashes([FileToHash(source, located.nbytes, 0)], shared=shared)
        hashes.start()
        for number in order[:left]:
            item, chunk = jobs[number + 1]
            found, data = shared.chunk_with_memory(item, chunk, scratch)
            assert memory(found) == data == memory(checkpoint.chunk(item, chunk))
        assert hashes.digests() == [hashlib.sha256(source.read_bytes()).hexdigest()]


def test_work_that_is_off_ends(source: Path) -> None:
    with SourceCheckpoint(source) as checkpoint:
        hashes = FileHashes([FileToHash(source, source.stat().st_size)], shared=SharedReads(checkpoint))
        hashes.start()
        hashes.cancel()
        hashes.join()
