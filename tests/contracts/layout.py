"""What every layout must do, whatever its files look like.

Subclass `LayoutContract` in a test file and give it a `layout` and a `write`, which makes a checkpoint as its own
software saves it. `check_located` alone holds for any located checkpoint.
"""

from __future__ import annotations

import math
import random
import struct
import tracemalloc
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from statecodec.errors import LayoutError
from statecodec.layouts import (
    Box,
    Layout,
    LogicalTensor,
    Run,
    Source,
    SourceFile,
    list_memory,
    list_path,
    locate,
    tree,
)
from statecodec.layouts.facts.assign import named
from statecodec.layouts.registry import LAYOUTS, claimed

MEMORY = 48 << 20  # bytes that reading a damaged small checkpoint may take
STRANGERS = {
    "empty": b"",
    "zeros": bytes(4096),
    "text": b"the quick brown fox " * 300,
    "json": b'{"a": {"dtype": "F32"}}',
    "pickle": b"\x80\x02}q\x00.",
    "noise": random.Random(5).randbytes(5000),
}


# ---- any located checkpoint


def check_located(source: Source, contents: dict[str, bytes]) -> None:
    """Everything that a located checkpoint promises about itself; `contents`: the bytes of its files."""
    assert [f.path for f in source.files] == sorted(contents)
    names = [t.name for t in source.tensors]
    assert len(set(names)) == len(names)
    assert all(name.encode() for name in names), "names are valid Unicode"
    for file in source.files:
        check_file(file, contents[file.path])
    check_pieces(source.tensors, {f.path: f for f in source.files})
    for moments in source.moments:
        assert {moments.exp_avg, moments.exp_avg_sq} <= set(names)
        assert moments.weight is None or moments.weight in names


def check_file(file: SourceFile, content: bytes) -> None:
    """Regions are sorted, disjoint and of their shape; views lie inside them; CRCs hold."""
    assert file.nbytes == len(content)
    end, skeleton = 0, []
    for region in file.regions:
        assert region.offset >= end
        skeleton.append(content[end : region.offset])
        end = region.offset + region.nbytes
        assert math.prod(region.shape) * region.dtype.itemsize == region.nbytes
    skeleton.append(content[end:])
    payload = [content[r.offset : r.offset + r.nbytes] for r in file.regions]
    assert b"".join(s + p for s, p in zip(skeleton, [*payload, b""], strict=True)) == content
    assert len({v.name for v in file.views}) == len(file.views)
    for view in file.views:
        region = file.regions[view.region]
        if math.prod(view.shape):
            last = view.offset + sum((n - 1) * s for n, s in zip(view.shape, view.stride, strict=True))
            assert view.offset >= 0
            assert (last + 1) * view.dtype.itemsize <= region.nbytes
    for crc in file.crcs:
        stored = {content[at : at + 4] for at in crc.at}
        assert stored == {struct.pack("<I", zlib.crc32(content[crc.offset : crc.offset + crc.nbytes]))}


def check_pieces(tensors: tuple[LogicalTensor, ...], files: dict[str, SourceFile]) -> None:
    """Every region holds one piece of one tensor, and the pieces of a tensor are all of it, once."""
    used = Counter((piece.file, piece.region) for tensor in tensors for piece in tensor.pieces)
    assert used == Counter((f.path, i) for f in files.values() for i in range(len(f.regions)))
    for tensor in tensors:
        covered = [_elements(tensor, piece.part) for piece in tensor.pieces]
        for piece, elements in zip(tensor.pieces, covered, strict=True):
            assert files[piece.file].regions[piece.region].nbytes == len(elements) * tensor.dtype.itemsize
        everything = [e for elements in covered for e in elements]
        assert len(everything) == len(set(everything)) == math.prod(tensor.shape)


def _elements(tensor: LogicalTensor, part: Box | Run | None) -> Any:
    numel = math.prod(tensor.shape)
    if part is None:
        return range(numel)
    if isinstance(part, Run):
        assert 0 <= part.start <= part.stop <= numel
        return range(part.start, part.stop)
    assert all(o >= 0 and o + n <= whole for o, n, whole in zip(part.offset, part.shape, tensor.shape, strict=True))
    box = tuple(slice(o, o + n) for o, n in zip(part.offset, part.shape, strict=True))
    return torch.arange(numel).view(tensor.shape)[box].flatten().tolist()


def same(a: Any, b: Any) -> bool:
    """Equal in structure, types, dtypes and values."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and type(a) is type(b):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


# ---- one layout


class LayoutContract:
    """The suite; `layout` and `write` are what it needs."""

    layout: Layout
    sample = 40
    """Truncations and damaged bytes tried for each file."""

    def write(self, folder: Path) -> Any:
        """Write one small checkpoint into an empty folder and return what its own software loads from it."""
        raise NotImplementedError

    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> tuple[Path, Any]:
        """(what to locate, its content): the file where there is one, else the folder."""
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        expected = self.write(folder)
        files = list(folder.rglob("*"))
        return (files[0] if len(files) == 1 else folder), expected

    @pytest.fixture
    def contents(self, checkpoint: tuple[Path, Any]) -> dict[str, bytes]:
        return contents_of(checkpoint[0])

    def test_it_is_registered(self) -> None:
        assert self.layout in LAYOUTS
        assert [layout.name for layout in LAYOUTS].count(self.layout.name) == 1

    def test_it_claims_its_own(self, checkpoint: tuple[Path, Any]) -> None:
        layouts = {layout.name for layout, _ in claimed(list_path(checkpoint[0]))}
        assert self.layout.name in layouts
        asked = list_path(checkpoint[0])
        assert all(layout.claims(asked) is None for layout in LAYOUTS if layout.name not in layouts)

    @pytest.mark.parametrize("stranger", STRANGERS)
    def test_it_claims_nothing_else(self, stranger: str) -> None:
        assert self.layout.claims(list_memory({"x": STRANGERS[stranger]})) is None
        assert self.layout.claims(list_memory(STRANGERS, is_directory=True)) is None

    def test_what_it_locates_is_consistent(self, checkpoint: tuple[Path, Any], contents: dict[str, bytes]) -> None:
        source = locate(checkpoint[0])
        check_located(source, contents)
        assert source == locate(checkpoint[0])
        assert self.layout.name in {file.layout for file in source.files}
        assert source.tensors

    def test_the_tree_is_what_its_own_software_loads(self, checkpoint: tuple[Path, Any]) -> None:
        assert same(tree(checkpoint[0]), checkpoint[1])

    def test_truncations_are_errors_or_change_nothing(self, contents: dict[str, bytes]) -> None:
        rng = random.Random(0)
        for path, content in contents.items():
            sizes = {len(content) - 1, *(rng.randrange(len(content)) for _ in range(self.sample))} if content else ()
            for size in sizes:
                self.survives({**contents, path: content[:size]})

    def test_damaged_bytes_are_errors_or_consistent(self, contents: dict[str, bytes]) -> None:
        rng = random.Random(1)
        for path, content in contents.items():
            for _ in range(self.sample if content else 0):
                damaged = bytearray(content)
                damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
                self.survives({**contents, path: bytes(damaged)})

    def survives(self, contents: dict[str, bytes]) -> None:
        """Locate and rebuild damaged files: an error of ours or a consistent answer, in little memory."""
        listing = list_memory(contents, is_directory=len(contents) > 1)
        tracemalloc.start()
        try:
            for layout, part in claimed(listing):
                located = layout.locate(part)
                tensors, *_ = named([located])
                crcs_aside = [SourceFile(f.path, f.nbytes, f.mode, f.layout, f.regions, f.views) for f in located.files]
                for file in crcs_aside:
                    check_file(file, contents[file.path])
                check_pieces(tuple(tensors), {file.path: file for file in located.files})
                tree(listing)
        except LayoutError:
            pass
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < MEMORY


def contents_of(path: Path) -> dict[str, bytes]:
    """The bytes of a file, or of all files of a folder, by path."""
    if path.is_file():
        return {path.name: path.read_bytes()}
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}
