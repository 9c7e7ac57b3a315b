"""What changed since a base, through whole files: it is never mistaken for the tensor's own parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import statecodec
from statecodec import codecs
from statecodec._version import __version__
from statecodec.checkpoint.stored import StoredCheckpoint
from statecodec.codecs import Change, Encoding
from statecodec.errors import FormatError, UnsupportedVersion, UsageError
from statecodec.format import Reader
from tests.analysis.make_link import EXPECTED, PACKINGS, described, write_links
from tests.format.support import forge, manifest


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def saved(path: Path, **tensors: torch.Tensor) -> Path:
    torch.save({"model": tensors}, path)
    return path


def stored_as(path: str | Path) -> dict[str, Encoding]:
    with Reader(path) as reader:
        return {item.name: item.encoding for item in reader.items}


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_link_is_written_as_ever(packing: str, tmp_path: Path) -> None:
    """Against what the code wrote when changes were codecs: forms, items and parts; and unpacked, every byte.

    The digests of whole files were renewed when stored errors got seven digits, when the document got `asked`, when
    `companded` got version 3, and when the format became 2.1 and 2.2: but for these the files were those of before.
    """
    known, links = json.loads(EXPECTED.read_text()), write_links(tmp_path, packing)
    same = packing == "none" and known["statecodec"] == __version__
    for link in links:
        now, then = described(link), known["files"][packing][link.name]
        assert now["items"] == then["items"]
        if same:
            assert now["sha256"] == then["sha256"]
    kinds = {str(encoding).partition("(")[0] for link in links for encoding in stored_as(link).values()}
    assert {"raw", "delta", "residual", "cast"} <= kinds


@pytest.mark.parametrize("size", [10, 200])
@pytest.mark.parametrize("pack", ["none", "zstd"])
def test_tensors_that_are_alike_but_for_the_change(size: int, pack: str, tmp_path: Path) -> None:
    """One codec, dtype, shape and storage; one is a change, one is not (there is nothing to gain)."""
    base = statecodec.compress(
        saved(tmp_path / "0.pt", a=normal(size, size), b=normal(size, size, seed=1)), preset="lossless", pack=pack
    )
    a, b = normal(size, size) + 1e-4, normal(size, size, seed=2)
    for rules in (["*.a=delta", "*.b=raw"], ["*.b=raw", "*.a=delta"]):
        link = statecodec.compress(
            saved(tmp_path / "1.pt", a=a, b=b), base=base.path, preset="lossless", pack=pack, rules=rules, force=True
        )
        found = stored_as(link.path)
        assert found["model.a"] == Encoding(codecs.Raw(), Change.PARTS)
        assert found["model.b"] == Encoding(codecs.Raw())
        loaded = statecodec.load(link.path)["model"]
        assert torch.equal(loaded["a"], a)
        assert torch.equal(loaded["b"], b)


@pytest.mark.parametrize("text", ["delta(inner=companded)", "residual(inner=companded)", "delta(inner=uniform)"])
@pytest.mark.parametrize("pack", ["none", "zstd"])
def test_values_that_are_refused_are_no_change_either(text: str, pack: str, tmp_path: Path) -> None:
    """The codec that takes the refused one's place stores the tensor, not what changed of it."""
    base = statecodec.compress(saved(tmp_path / "0.pt", a=normal(100, 100), b=normal(100, 100)), pack=pack)
    a = normal(100, 100).index_fill(0, torch.tensor([50]), torch.inf)
    link = statecodec.compress(
        saved(tmp_path / "1.pt", a=a, b=normal(100, 100)), base=base.path, pack=pack, rules=[f"*={text}"], verify=True
    )
    found = stored_as(link.path)
    assert found["model.a"] == Encoding(codecs.Raw())
    assert found["model.b"] == Encoding.parse(text)
    assert torch.equal(statecodec.load(link.path)["model"]["a"], a)
    assert any("kept exact" in note and "model.a" in note for note in link.notes)


def test_a_chunk_that_is_refused_late_takes_back_the_change(tmp_path: Path) -> None:
    a = normal(2200, 1000)  # three chunks; the last one is refused
    base = statecodec.compress(saved(tmp_path / "0.pt", a=a))
    a = a.index_fill(0, torch.tensor([2199]), torch.nan)
    link = statecodec.compress(saved(tmp_path / "1.pt", a=a), base=base.path, rules=["*=residual"], verify=True)
    assert stored_as(link.path)["model.a"] == Encoding(codecs.Raw())
    assert torch.equal(statecodec.load(link.path)["model"]["a"].view(torch.int32), a.view(torch.int32))


@pytest.fixture
def chain(tmp_path: Path) -> list[Path]:
    """A base, a link of changed values (`v`) and of changed parts (`p`), and a link on that."""
    made: list[Path] = []
    step = "uniform(step=0.001)"
    for i in range(3):
        source = saved(tmp_path / "c.pt", v=normal(80, 100) + 0.01 * i, p=normal(80, 100) * (1 + 1e-4 * i))
        rules = [f"*={step}"] if i == 0 else [f"*.v=residual(inner={step})", f"*.p=delta(inner={step})"]
        rules = rules if i < 2 else [f"*={step}"]
        made.append(tmp_path / f"{i}.sc.safetensors")
        statecodec.compress(source, made[-1], base=made[-2] if i else None, rules=rules, verify=True)
    return made


def test_a_file_alone_does_not_hold_a_change(chain: list[Path]) -> None:
    with Reader(chain[1]) as reader:
        for name in ("model.v", "model.p"):
            with pytest.raises(FormatError, match="what changed since a base"):
                reader.read(name)
        assert set(reader.read_chunk(reader.index("model.p"), 0)) == {"delta.codes"}


def test_changed_values_are_no_parts_of_their_codec(chain: list[Path]) -> None:
    """The parts that a link's item has under the very codec of its difference are those of its values."""
    codec = codecs.parse("uniform(step=0.001)")
    with StoredCheckpoint.open(chain[1]) as stored:
        v, p = (stored.tensors[f"model.{name}"].index for name in "vp")
        (place,) = stored.reader.items[v].chunks
        for index in (v, p):
            expected = codec.encode(stored.decode(index)).parts["codes"]
            assert torch.equal(stored.parts_under(codec, index, place)["codes"], expected)
        assert stored.encoded(v).codec == codecs.Raw()
        assert stored.encoded(p).codec == codec
        assert torch.equal(stored.encoded(v).decode(), stored.decode(v))
        assert torch.equal(stored.encoded(p).decode(), stored.decode(p))
        with pytest.raises(UsageError, match="values and no parts"):
            stored.parts(v, 0)


def test_links_on_changed_values_restore(chain: list[Path], tmp_path: Path) -> None:
    alone = statecodec.compress(tmp_path / "c.pt", tmp_path / "alone.sc.safetensors", rules=["*=uniform(step=0.001)"])
    for name, x in statecodec.load(chain[2])["model"].items():
        assert torch.equal(x, statecodec.load(alone.path)["model"][name])


def test_a_change_of_values_is_no_base_of_parts_of_its_codec(tmp_path: Path) -> None:
    """Chosen by itself is only a change against the parts that the base's tensor really has."""
    codec, previous = "companded(curve=linear)", None
    for i, rule in enumerate((codec, f"residual(inner={codec})", codec)):
        source = saved(tmp_path / "c.pt", w=normal(80, 100) + 1e-6 * i)
        previous = statecodec.compress(
            source, tmp_path / f"{i}.sc.safetensors", base=previous, rules=[f"*={rule}"], verify=True
        ).path
    assert stored_as(previous)["model.w"] == Encoding(codecs.parse(codec))


def test_converted_links_stand_alone(chain: list[Path], tmp_path: Path) -> None:
    made = statecodec.convert(chain[1], tmp_path / "alone.sc.safetensors", "nothing=raw").path
    found, before = stored_as(made), statecodec.load(chain[1])["model"]
    assert found["model.v"] == Encoding(codecs.Raw())  # the numbers: the grid was that of the difference
    assert found["model.p"] == Encoding(codecs.parse("uniform(step=0.001)"))
    for path in chain:
        path.unlink()
    for name, x in statecodec.load(made)["model"].items():
        assert torch.equal(x, before[name])


@pytest.mark.parametrize("compressed", [True, False])
def test_convert_makes_no_changes(compressed: bool, chain: list[Path], tmp_path: Path) -> None:
    source = chain[1] if compressed else tmp_path / "c.pt"
    with pytest.raises(UsageError, match="what changed since a base"):
        statecodec.convert(source, tmp_path / "out.sc.safetensors", "*=residual")
    assert not (tmp_path / "out.sc.safetensors").exists()


def test_changes_of_many_chunks_are_cut_as_their_codec_is(tmp_path: Path) -> None:
    """A codec with rows along the last dimension is cut along it, and so is what changed of its parts."""
    codec = "companded(curve=linear,rows=last)"
    a = normal(1100, 32, 32)
    base = statecodec.compress(saved(tmp_path / "0.pt", a=a), rules=[f"*={codec}"])
    for text in (f"delta(inner={codec})", f"residual(inner={codec})"):
        link = statecodec.compress(
            saved(tmp_path / "1.pt", a=a + 1e-5), base=base.path, rules=[f"*={text}"], force=True, verify=True
        )
        assert str(stored_as(link.path)["model.a"]) == text


def test_a_change_that_a_reader_does_not_know_is_named(chain: list[Path]) -> None:
    def unknown(value: dict[str, object]) -> None:
        text = json.dumps(value["forms"])
        assert '"name": "delta"' in text
        value["forms"] = json.loads(text.replace('"name": "delta"', '"name": "epsilon"'))

    chain[1].write_bytes(forge(chain[1].read_bytes(), unknown))
    with pytest.raises(UnsupportedVersion, match="'epsilon'"):
        statecodec.load(chain[1])


def test_a_change_inside_a_codec_is_refused_in_files(chain: list[Path]) -> None:
    def nested(value: dict[str, list[dict[str, object]]]) -> None:
        for form in value["forms"]:
            form["codec"] = {"name": "folded", "version": 2, "inner": {"name": "delta", "version": 1}}

    assert "forms" in manifest(chain[1])
    chain[1].write_bytes(forge(chain[1].read_bytes(), nested))
    with pytest.raises(FormatError, match="delta is no codec"):
        Reader(chain[1])
