"""Every single-bit flip, truncation, swap and duplication is an error, or changes nothing at all that can be read."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch

from statecodec.codecs import Raw, parse
from statecodec.errors import FormatError
from statecodec.format import Reader
from tests.format.support import join_file, split_file, write

FLIPS = int(os.environ.get("STATECODEC_FLIPS", "600"))  # per kind of file, of which there are five


def tensors() -> dict[str, tuple[torch.Tensor, object]]:
    g = torch.Generator().manual_seed(1)
    w = torch.randn(60, 60, generator=g) * 0.02
    return {
        "w": (w, Raw()),
        "w twice": (w.clone(), Raw()),
        "b": (torch.randn(9, generator=g).bfloat16(), Raw()),
        "zeros": (torch.zeros(50, 50), Raw()),
        "m": (torch.randn(40, 64, generator=g), parse("companded(group=32)")),
        "u": (w * 50, parse("uniform(step=0.01)")),
        "v": (w.square(), parse("logarithmic")),
        "\u00e9\n": (torch.ones(2), Raw()),
    }


def outcome(path: Path) -> object:
    """Everything that can be read: an exact value to compare, or the FormatError that came out."""
    try:
        with Reader(path) as reader:
            parts = [
                (item.name, k, part.dtype, tuple(part.shape), bytes(part.view(-1).view(torch.uint8).numpy()))
                for item in reader.items
                for k, part in reader.read(item.name).parts.items()
            ]
            rest = [(i.name, i.encoding, i.shape, i.dtype, i.attributes) for i in reader.items]
            return parts, rest, reader.document, reader.format_version
    except FormatError as error:
        return error


KINDS = {
    "plain": ("none", None, 0),
    "packed": ("zstd", None, 0),
    "first shard": ("zstd", 15_000, 0),
    "last shard": ("zstd", 15_000, -1),
    "index": ("zstd", 15_000, None),
}


@pytest.fixture(params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """What to open, and the file to damage."""
    packing, shard, which = KINDS[request.param]
    written = write(tmp_path / "x.safetensors", tensors(), packing=packing, max_shard_size=shard)  # type: ignore[arg-type]
    assert not isinstance(outcome(written.path), FormatError)
    return written.path, written.path if which is None else written.files[which]


def test_bit_flips(case: tuple[Path, Path]) -> None:
    opened, damaged = case
    data = damaged.read_bytes()
    rng = random.Random(damaged.name)
    # All of the front (length, metadata), and random places everywhere.
    bits = [*range(64), *(rng.randrange(len(data) * 8) for _ in range(FLIPS))]
    for bit in bits:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.write_bytes(flipped)
        assert isinstance(outcome(opened), FormatError), f"bit {bit % 8} of byte {bit // 8}: not noticed"


def test_truncations_and_appendices(case: tuple[Path, Path]) -> None:
    opened, damaged = case
    data = damaged.read_bytes()
    rng = random.Random(0)
    for size in [0, 1, 7, 8, 9, len(data) // 2, len(data) - 1, *(rng.randrange(len(data)) for _ in range(60))]:
        damaged.write_bytes(data[:size])
        assert isinstance(outcome(opened), FormatError), f"cut to {size} of {len(data)} bytes: not noticed"
    for extra in (b"\0", b"x", b"{}", data):
        damaged.write_bytes(data + extra)
        assert isinstance(outcome(opened), FormatError)
    damaged.unlink()
    assert isinstance(outcome(opened), FormatError)


def test_block_swaps_and_duplications(case: tuple[Path, Path]) -> None:
    opened, damaged = case
    data = damaged.read_bytes()
    rng = random.Random(0)
    for _ in range(120):
        size = min(rng.choice([1, 8, 64, 512]), len(data) // 2)
        a, b = rng.randrange(len(data) - size), rng.randrange(len(data) - size)
        changed = bytearray(data)
        changed[b : b + size] = data[a : a + size]
        if rng.random() < 0.5:
            changed[a : a + size] = data[b : b + size]
        if bytes(changed) != data:
            damaged.write_bytes(changed)
            assert isinstance(outcome(opened), FormatError), f"{size} bytes of {a} at {b}: not noticed"


def test_shards_of_two_runs_do_not_mix(tmp_path: Path) -> None:
    values = tensors()
    one = write(tmp_path / "a" / ".." / "x.safetensors", values, max_shard_size=15_000)  # type: ignore[arg-type]
    first = one.files[0].read_bytes()
    values["w"] = (values["w"][0] * 2, Raw())
    two = write(tmp_path / "x.safetensors", values, max_shard_size=15_000, force=True)  # type: ignore[arg-type]
    two.files[0].write_bytes(first)
    assert isinstance(outcome(two.path), FormatError)
    swapped = [f.read_bytes() for f in one.files]
    one.files[0].write_bytes(swapped[1])
    one.files[1].write_bytes(swapped[0])
    assert isinstance(outcome(two.path), FormatError)


def test_a_shard_with_a_header_of_its_own_is_refused(tmp_path: Path) -> None:
    """The same entries under other metadata, with a correct digest: not the shard the manifest names."""
    written = write(tmp_path / "x.safetensors", tensors(), max_shard_size=15_000)  # type: ignore[arg-type]
    header, body = split_file(written.files[0].read_bytes())
    header["__metadata__"]["more"] = "1"
    written.files[0].write_bytes(join_file(header, body))
    assert "not the shard" in str(outcome(written.path))


def test_verify_names_the_damaged_item(tmp_path: Path) -> None:
    path = write(tmp_path / "x", tensors(), packing="none").path  # type: ignore[arg-type]
    with Reader(path) as reader:
        entry = reader._headers[0].entries["m/codes"]
        at = reader._headers[0].data + entry.start + 5
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)
    with Reader(path) as reader:
        results = {c.name: c.error for c in reader.verify()}
    assert [name for name, error in results.items() if error] == ["m"]
    assert "checksum" in str(results["m"])
