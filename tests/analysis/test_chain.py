"""Chains: every link restores to the bits of a file of its own; a wrong, missing or damaged base is refused by name."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import statecodec
from statecodec import codecs
from statecodec.checkpoint.chain import MAX_LINKS
from statecodec.codecs import Change, Encoding
from statecodec.codecs.changes import add_parts, subtract_parts
from statecodec.dtypes import of
from statecodec.errors import CorruptFile, FormatError, StatecodecError, UsageError
from statecodec.format import Reader
from tests.analysis.make_golden import GOLDEN, tensor_digest
from tests.format.support import forge

DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex128,
)  # fmt: skip


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def chain(run: list[Path], folder: Path, **options: object) -> list[Path]:
    """A compressed chain over a run."""
    made: list[Path] = []
    for i, checkpoint in enumerate(run):
        made.append(folder / f"link{i}.sc.safetensors")
        statecodec.compress(checkpoint, made[-1], base=made[-2] if i else None, **options)  # type: ignore[arg-type]
    return made


@pytest.mark.parametrize("preset", ["lossless", "resume", "tiny"])
def test_links_restore_to_the_bits_of_a_file_of_their_own(run: list[Path], preset: str, tmp_path: Path) -> None:
    links = chain(run, tmp_path, preset=preset, verify=True)
    for checkpoint, link in zip(run, links, strict=True):
        alone = tmp_path / "alone.sc.safetensors"
        statecodec.compress(checkpoint, alone, preset=preset, force=True)
        restored = [tmp_path / "a.pt", tmp_path / "b.pt"]
        for source, target in zip((link, alone), restored, strict=True):
            statecodec.restore(source, target, force=True)
        assert digest(restored[0]) == digest(restored[1])
        if preset == "lossless":
            assert digest(restored[0]) == digest(checkpoint)
        assert statecodec.diff(alone, link).identical
        with statecodec.open(link) as f, statecodec.open(alone) as g:
            for name in g.names():
                assert torch.equal(f.read(name), g.read(name))
                assert f.read_encoded(name).codec == g.read_encoded(name).codec
        statecodec.verify(link, checkpoint)


def test_close_checkpoints_are_smaller_as_links(runs: dict[str, list[Path]], tmp_path: Path) -> None:
    links = chain(runs["gpt"], tmp_path)  # the last two are one step apart
    with Reader(links[-1]) as reader:
        assert any(item.encoding.change is Change.PARTS for item in reader.items)
    alone = statecodec.compress(runs["gpt"][-1], tmp_path / "alone.sc.safetensors")
    assert links[-1].stat().st_size < 0.85 * alone.bytes
    assert statecodec.load(links[-1])["iter_num"] == 41


def test_residuals_keep_their_bound_and_do_not_add_up(runs: dict[str, list[Path]], tmp_path: Path) -> None:
    run, rule = runs["gpt"], "weight:numel>=4096=residual(inner=companded(curve=linear,bits=8,group=64))"
    previous = tmp_path / "first.sc.safetensors"
    statecodec.compress(run[0], previous)
    for i in range(1, 3):
        link = tmp_path / f"r{i}.sc.safetensors"
        made = statecodec.compress(run[i], link, base=previous, rules=[rule], verify=True)
        before, exact = (torch_weights(statecodec.load(p)) for p in (previous, run[i]))
        after = torch_weights(statecodec.load(link))
        for name, x in exact.items():
            step = (x - before[name]).abs().amax()
            assert (after[name] - x).abs().amax() <= step / 127 * 0.51 + x.abs().amax() * 2.0**-23, name
        assert any(t.codec.startswith("residual") for t in made.tensors)
        previous = link


def torch_weights(checkpoint: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in checkpoint["model"].items() if v.numel() >= 4096}


def test_weights_on_a_grid_are_stored_since_the_base(runs: dict[str, list[Path]], tmp_path: Path) -> None:
    """From one file of the run, the weights of the next one, a step later, are smaller than without it."""
    run = runs["gpt"]
    first = tmp_path / "first.sc.safetensors"
    statecodec.compress(run[1], first)
    link = statecodec.compress(run[2], tmp_path / "link.sc.safetensors", base=first, max_weight_error=0.1)
    alone = statecodec.compress(run[2], tmp_path / "alone.sc.safetensors", max_weight_error=0.1)
    assert link.total is not None
    assert link.total["weight_step_error"] <= 0.1001
    assert all(torch.equal(a, b) for a, b in zip(*(_weights(p.path) for p in (link, alone)), strict=True))
    assert sum(t.bytes_after for t in link.tensors if t.role == "weight") < 0.7 * sum(
        t.bytes_after for t in alone.tensors if t.role == "weight"
    )


def _weights(path: str) -> list[torch.Tensor]:
    return list(statecodec.load(path)["model"].values())


def test_nothing_to_gain_makes_a_file_of_its_own(tmp_path: Path) -> None:
    for i in range(2):
        generator = torch.Generator().manual_seed(i)
        torch.save({"model": {"w": torch.randn(256, 256, generator=generator)}}, tmp_path / f"{i}.pt")
    first = statecodec.compress(tmp_path / "0.pt", preset="lossless")
    made = statecodec.compress(tmp_path / "1.pt", preset="lossless", base=first.path, rules=["skeleton=raw"])
    with Reader(made.path) as reader:
        if "base" not in reader.document:
            assert any("stands alone" in note for note in made.notes)
        assert not any(i.encoding.change for i in reader.items if i.name == "model.w")


def test_a_missing_base_is_named(runs: dict[str, list[Path]], tmp_path: Path) -> None:
    links = chain(runs["mlp"], tmp_path)
    for name in ("restore", "load", "verify"):
        moved = tmp_path / "elsewhere"
        moved.mkdir(exist_ok=True)
        shutil.copy(links[1], moved / "link.sc.safetensors")
        with pytest.raises(FormatError, match=r"link0\.sc\.safetensors, which must lie beside it"):
            getattr(statecodec, name)(moved / "link.sc.safetensors")
    assert statecodec.inspect(moved / "link.sc.safetensors").num_params > 0  # needs the manifest alone


def test_another_file_under_the_base_s_name_is_refused(runs: dict[str, list[Path]], tmp_path: Path) -> None:
    links = chain(runs["mlp"], tmp_path)
    links[0].unlink()  # statecodec itself would not replace it
    statecodec.compress(runs["mlp"][2], links[0])
    with pytest.raises(CorruptFile, match="is not the file that"):
        statecodec.load(links[1])
    with pytest.raises(CorruptFile):
        statecodec.restore(links[2], tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


def test_damage_in_the_base_is_found(runs: dict[str, list[Path]], tmp_path: Path) -> None:
    links = chain(runs["mlp"], tmp_path)
    data = bytearray(links[0].read_bytes())
    for at in range(len(data) // 8, len(data) * 7 // 8, 997):  # in every tensor: a link needs some of them only
        data[at] ^= 1
    links[0].write_bytes(data)
    with pytest.raises(CorruptFile):
        statecodec.verify(links[2])
    with pytest.raises(StatecodecError):
        statecodec.load(links[2])


def test_chains_end(tmp_path: Path) -> None:
    weights = torch.arange(8192, dtype=torch.float32).view(64, 128)
    previous = None
    for i in range(MAX_LINKS + 1):
        torch.save({"model": {"w": weights + i}}, tmp_path / "c.pt")
        previous = statecodec.compress(tmp_path / "c.pt", tmp_path / f"{i}.sc.safetensors", base=previous).path
    assert torch.allclose(statecodec.load(previous)["model"]["w"], weights + MAX_LINKS)
    with pytest.raises(UsageError, match="16 are the most"):
        statecodec.compress(tmp_path / "c.pt", tmp_path / "last.sc.safetensors", base=previous)


def test_wrong_bases(runs: dict[str, list[Path]], tmp_path: Path) -> None:
    source = runs["mlp"][0]
    first = statecodec.compress(source, tmp_path / "first.sc.safetensors").path
    (tmp_path / "sub").mkdir()
    with pytest.raises(UsageError, match="not a compressed checkpoint"):
        statecodec.compress(source, tmp_path / "a.sc.safetensors", base=source)
    with pytest.raises(UsageError, match="not a compressed checkpoint"):
        statecodec.compress(source, tmp_path / "a.sc.safetensors", base=tmp_path / "none.sc.safetensors")
    with pytest.raises(UsageError, match="beside its base"):
        statecodec.compress(source, tmp_path / "sub" / "a.sc.safetensors", base=first)
    with pytest.raises(UsageError, match="breaks the chain"):
        statecodec.compress(source, first, base=first, force=True)
    second = statecodec.compress(source, tmp_path / "second.sc.safetensors", base=first).path
    with pytest.raises(UsageError, match="is the base of second"):
        statecodec.compress(source, first, base=second, force=True)
    with pytest.raises(UsageError, match="give one"):
        statecodec.compress(source, tmp_path / "a.sc.safetensors", rules=["weight=residual"])


@pytest.mark.parametrize(
    "change",
    [
        {"file": "../first.sc.safetensors"}, {"file": "/etc/passwd"}, {"file": ""}, {"file": 3}, {"manifest": "0" * 31},
        {"length": 0}, {"length": 17}, {"length": 2}, {"length": True}, None,
    ],
)  # fmt: skip
def test_hostile_base_entries(change: dict[str, object] | None, runs: dict[str, list[Path]], tmp_path: Path) -> None:
    links = chain(runs["mlp"][:2], tmp_path)

    def damage(manifest: dict[str, object]) -> None:
        document = manifest["document"]
        assert isinstance(document, dict)
        if change is None:
            del document["base"]
        else:
            document["base"].update(change)

    links[1].write_bytes(forge(links[1].read_bytes(), damage))
    with pytest.raises(FormatError):
        statecodec.load(links[1])


@settings(max_examples=80)
@given(st.sampled_from(DTYPES), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_delta_is_the_identity_on_any_bits(dtype: torch.dtype, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def bits() -> torch.Tensor:
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count * dtype.itemsize,), generator=generator)
        return raw.to(torch.uint8).view(dtype)

    a, b = bits(), bits()
    stored = subtract_parts({"data": a}, {"data": b})
    assert {k: (of(t.dtype), tuple(t.shape)) for k, t in stored.items()} == {
        k: (s.dtype, s.shape) for k, s in Encoding(codecs.Raw(), Change.PARTS).parts((count,), of(dtype)).items()
    }
    back = add_parts(stored, {"data": b})["data"]
    assert torch.equal(back.view(torch.uint8), a.view(torch.uint8))


def test_small_changes_become_small_numbers() -> None:
    base = torch.tensor([100, 100, 100, 100], dtype=torch.int16)
    changed = base + torch.tensor([0, -1, 1, -2], dtype=torch.int16)
    stored = subtract_parts({"data": changed}, {"data": base})
    assert stored["delta.data"].tolist() == [0, 1, 2, 3]


def test_golden_chain_reads_as_ever() -> None:
    known = json.loads((GOLDEN / "expected.json").read_text())
    assert {p.name for p in GOLDEN.iterdir()} == {*known, "expected.json"}
    for name, expected in known.items():
        assert digest(GOLDEN / name) == expected["sha256"], f"{name} was changed"
        with statecodec.open(GOLDEN / name) as f:
            found = {name: tensor_digest(f.read(name)) for name in f.names()}
        assert found == expected["tensors"]
    kinds = {str(f.encoding).partition("(")[0] for f in Reader(GOLDEN / "link2.sc.safetensors").items}
    assert {"delta", "residual"} <= kinds


@pytest.mark.parametrize("codec", ["delta", "residual"])
def test_a_rule_for_a_change_needs_a_base_that_has_the_tensor(codec: str, tmp_path: Path) -> None:
    for name, keys in (("old", "a"), ("new", "ab")):
        torch.save({"model": {k: torch.randn(80, 80) for k in keys}}, tmp_path / f"{name}.pt")
    for pattern in ("*.b", "nothing.of.that.name"):
        with pytest.raises(UsageError, match=r"give one \(--base\)"):
            statecodec.compress(tmp_path / "new.pt", rules=[f"{pattern}={codec}"])
    base = statecodec.compress(tmp_path / "old.pt", preset="lossless").path
    with pytest.raises(UsageError, match="has no such tensor"):
        statecodec.compress(tmp_path / "new.pt", rules=[f"*.b={codec}"], base=base)
    assert not (tmp_path / "new.sc.safetensors").exists()
