"""A compression in shares: the same bytes as in one go, and nothing joined that does not fit."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import statecodec
from statecodec.errors import CorruptFile, OutputExists, UsageError
from statecodec.verbs.shares import Share, deal


def trained(path: Path, *, layers: int = 3, steps: int = 3) -> Path:
    torch.manual_seed(0)
    net = torch.nn.Sequential(*(torch.nn.Linear(96, 96) for _ in range(layers)))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(8, 96)).square().mean().backward()
        optimizer.step()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "step": steps}, path)
    return path


def folder(path: Path) -> Path:
    (path / "sub").mkdir(parents=True)
    trained(path / "a.pt")
    trained(path / "sub" / "b.pt", layers=2, steps=5)
    os.link(path / "a.pt", path / "same.pt")
    (path / "notes.txt").write_text("as it is")
    return path


def mixed(path: Path) -> Path:
    """Weights that follow from masters, which another share would hold."""
    torch.manual_seed(0)
    masters = {f"layer{i}": 0.02 * torch.randn(96, 96) for i in range(3)}
    state = {
        i: {"exp_avg": w * 0.1, "exp_avg_sq": w**2, "step": torch.tensor(3.0), "master_param": w}
        for i, w in enumerate(masters.values())
    }
    groups = [{"params": [0, 1, 2], "param_names": list(masters), "lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8}]
    weights = {name: w.bfloat16() for name, w in masters.items()}
    torch.save({"optimizer": {"state": state, "param_groups": groups}, "model": weights}, path)
    return path


SETTINGS: list[dict[str, Any]] = [
    {},
    {"preset": "lossless"},
    {"preset": "live", "pack": "none"},
    {"preset": "tiny", "max_shard_size": 60_000, "sha256": True},
    {"rules": ["exp_avg_sq=companded(curve=log)"], "max_step_error": 0.05},
]


@pytest.mark.parametrize(
    ("count", "settings"),
    [
        *itertools.product((1, 3), SETTINGS),
        *itertools.product((40,), (SETTINGS[0], SETTINGS[3])),  # more than there are tensors
    ],
)
@pytest.mark.parametrize("make", [trained, folder, mixed])
def test_the_joined_file_is_that_of_one_process(
    make: Any, settings: dict[str, Any], count: int, tmp_path: Path
) -> None:
    source = make(tmp_path / "src")
    (tmp_path / "one").mkdir()
    (tmp_path / "several").mkdir()
    whole = statecodec.compress(source, tmp_path / "one" / "x.sc.safetensors", **settings)
    target = tmp_path / "several" / "x.sc.safetensors"
    for number in reversed(range(1, count + 1)):
        made = statecodec.compress_share(source, target, share=f"{number}/{count}", threads=1, **settings)
        assert made.made
    joined = statecodec.finalize(source, target, verify=True)
    assert joined.asked == whole.asked
    files = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert sorted(p.name for p in target.parent.iterdir()) == files
    for name in files:
        assert (target.parent / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert joined.total is not None or whole.total is None
    assert [t.error for t in joined.tensors] == [t.error for t in whole.tensors]


def test_refused_values_links_and_notes_come_through(tmp_path: Path) -> None:
    first, second = trained(tmp_path / "1.pt"), trained(tmp_path / "2.pt", steps=4)
    content = torch.load(second)
    content["optimizer"]["state"][0]["exp_avg_sq"][0, 0] = -1.0
    content["optimizer"]["state"][2]["exp_avg_sq"][0, 0] = torch.nan
    torch.save(content, second)
    base = statecodec.compress(first, tmp_path / "1.sc.safetensors").path
    statecodec.compress(second, tmp_path / "whole.sc.safetensors", base=base)
    for share in ("1/2", "2/2"):
        statecodec.compress_share(second, tmp_path / "joined.sc.safetensors", share=share, base=base)
    report = statecodec.finalize(second, tmp_path / "joined.sc.safetensors")
    assert sum("kept exact" in note for note in report.notes) == 4
    joined, whole = (tmp_path / f"{name}.sc.safetensors" for name in ("joined", "whole"))
    assert joined.read_bytes() == whole.read_bytes()


def test_a_refused_tensor_moves_no_border_between_files(tmp_path: Path) -> None:
    """Files are divided by what was chosen; what a share then had to store otherwise is known to the share alone."""
    source = trained(tmp_path / "ckpt.pt")
    content = torch.load(source)
    for moments in content["optimizer"]["state"].values():
        moments["exp_avg_sq"].view(-1)[0] = -1.0
    torch.save(content, source)
    settings: dict[str, Any] = {"max_shard_size": 70_000}
    one, several = tmp_path / "one", tmp_path / "several"
    one.mkdir()
    several.mkdir()
    report = statecodec.compress(source, one / "x.sc.safetensors", **settings)
    assert any("kept exact" in note for note in report.notes)
    for share in ("1/2", "2/2"):
        statecodec.compress_share(source, several / "x.sc.safetensors", share=share, **settings)
    statecodec.finalize(source, several / "x.sc.safetensors")
    assert len(list(one.iterdir())) > 3
    assert {p.name: p.read_bytes() for p in several.iterdir()} == {p.name: p.read_bytes() for p in one.iterdir()}


def test_a_share_that_is_there_is_kept_and_a_lost_or_damaged_one_is_made_again(tmp_path: Path) -> None:
    source = trained(tmp_path / "ckpt.pt")
    target = tmp_path / "ckpt.sc.safetensors"
    for number in (1, 2, 3):
        statecodec.compress_share(source, share=Share(number, 3))
    again = statecodec.compress_share(source, share="2/3")
    assert not again.made
    assert statecodec.compress_share(source, share="2/3", preset="tiny").made
    with pytest.raises(UsageError, match="settings"):
        statecodec.finalize(source)
    share = Path(again.path)
    share.write_bytes(share.read_bytes()[:-100])
    assert statecodec.compress_share(source, share="2/3").made
    share.unlink()
    with pytest.raises(UsageError, match=r"1 of 3 shares of .* missing: 2"):
        statecodec.finalize(source)
    assert statecodec.compress_share(source, share="2/3").made
    statecodec.finalize(source)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt.pt", target.name]


def test_what_does_not_fit_is_refused_and_the_shares_stay(tmp_path: Path) -> None:
    source = trained(tmp_path / "ckpt.pt")
    with pytest.raises(UsageError, match="no shares"):
        statecodec.finalize(source)
    shares = [Path(statecodec.compress_share(source, share=f"{i}/2").path) for i in (1, 2)]
    there = os.stat(source)
    trained(source, steps=5)
    with pytest.raises(UsageError, match="another source"):
        statecodec.finalize(source)
    trained(source)
    os.utime(source, ns=(there.st_atime_ns, there.st_mtime_ns))
    flipped = bytearray(shares[1].read_bytes())
    flipped[len(flipped) // 2] ^= 1  # in a record: found when it is copied
    shares[1].write_bytes(flipped)
    with pytest.raises(CorruptFile):
        statecodec.finalize(source)
    assert all(share.exists() for share in shares)
    assert not (tmp_path / "ckpt.sc.safetensors").exists()
    statecodec.compress_share(source, tmp_path / "ckpt.sc.safetensors", share="1/5")
    with pytest.raises(UsageError, match="several divisions"):
        statecodec.finalize(source)
    (tmp_path / "ckpt.sc.safetensors").write_bytes(b"mine")
    with pytest.raises(OutputExists):
        statecodec.compress_share(source, share="1/2")


@pytest.mark.parametrize("text", ["0/2", "3/2", "1/0", "1", "a/b", "1/99999", "-1/2", "1/2/3", ""])
def test_shares_are_written_i_of_n(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected I/N"):
        statecodec.compress_share(trained(tmp_path / "ckpt.pt"), share=text)


@pytest.mark.parametrize("count", [1, 2, 5, 100])
def test_everything_is_dealt_once_and_evenly(count: int, tmp_path: Path) -> None:
    with statecodec.open(trained(tmp_path / "ckpt.pt", layers=12)) as source:
        shares = deal(source, count)  # type: ignore[arg-type]
        sizes = [sum(source.items[i].nbytes for i in share) for share in shares]
        largest = max(item.nbytes for item in source.items)
        assert sorted(itertools.chain.from_iterable(shares)) == list(range(len(source.items)))
        assert max(sizes) <= source.nbytes / count + 2 * largest
        for moments in source.moments:
            pair = {source.tensors[moments.exp_avg].index, source.tensors[moments.exp_avg_sq].index}
            assert any(pair <= set(share) for share in shares)
