"""Without `--pack`: codes of 16-bit moments and momenta are predicted, in every way into a file, and no others are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.utils._python_dispatch import TorchDispatchMode

import statecodec
from statecodec.choose.low_rank import is_low_rank
from statecodec.distributed.reader import StatecodecReader
from statecodec.distributed.writer import StatecodecWriter
from statecodec.format import Reader
from statecodec.verbs.finalize import finalize
from statecodec.verbs.shares import compress_share

PREDICTED = 7


def state(dtype: torch.dtype, noise: int = 1) -> dict[str, Any]:
    """A weight with moments of rank 4 and noise, of this seed."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, 4, generator=generator) for n in (300, 200))
    m = left @ right.T + 0.3 * torch.randn(300, 200, generator=torch.Generator().manual_seed(noise))
    v = m.square() * 0.1 + 1.0
    moments = {"step": torch.tensor(9.0), "exp_avg": (m * 1e-3).to(dtype), "exp_avg_sq": (v * 1e-6).to(dtype)}
    group = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "params": [0]}
    weight = torch.randn(300, 200, generator=generator).to(dtype)
    return {"model": {"w": weight}, "optimizer": {"state": {0: moments}, "param_groups": [group]}}


def with_momentum(dtype: torch.dtype) -> dict[str, Any]:
    """The same weight as SGD with momentum keeps it."""
    saved = state(dtype)
    momentum = saved["optimizer"]["state"][0]["exp_avg"]
    group = {"lr": 1e-2, "momentum": 0.9, "dampening": 0, "weight_decay": 0.0, "nesterov": False, "params": [0]}
    saved["optimizer"] = {"state": {0: {"momentum_buffer": momentum}}, "param_groups": [group]}
    return saved


def methods(path: Path) -> dict[str, set[int]]:
    """By role, the first bytes of the records of an item: how its first part is packed."""
    found = {}
    with Reader(path) as reader:
        for index, item in enumerate(reader.items):
            if item.storage == "packed":
                records = (reader.record(index, chunk).data for chunk in range(len(item.chunks)))
                found[item.attributes["role"]] = {int(record[0]) for record in records}
    return found


def compress(source: Path, target: Path) -> Path:
    return Path(statecodec.compress(source, target).path)


def from_memory(source: Path, target: Path) -> Path:
    return Path(statecodec.compress(torch.load(source, weights_only=True), target).path)


def by_shares(source: Path, target: Path) -> Path:
    for number in (1, 2):
        compress_share(source, target, share=f"{number}/2")
    return Path(finalize(source, target).path)


def converted(source: Path, target: Path) -> Path:
    """Of a file whose codes were not predicted."""
    first = statecodec.compress(source, target.with_name("first.sc.safetensors"), pack="zstd")
    return Path(statecodec.convert(first.path, target, to=["step=raw"]).path)


WAYS = (compress, from_memory, by_shares, converted)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moments_in_16_bits_are_predicted(
    dtype: torch.dtype, way: Callable[[Path, Path], Path], tmp_path: Path
) -> None:
    torch.save(state(dtype), tmp_path / "x.pt")
    made = methods(way(tmp_path / "x.pt", tmp_path / "made.sc.safetensors"))
    assert made["exp_avg"] == made["exp_avg_sq"] == {PREDICTED}
    assert PREDICTED not in made["weight"]


@pytest.mark.parametrize("way", WAYS)
def test_moments_in_fp32_are_not(way: Callable[[Path, Path], Path], tmp_path: Path) -> None:
    torch.save(state(torch.float32), tmp_path / "x.pt")
    made = methods(way(tmp_path / "x.pt", tmp_path / "made.sc.safetensors"))
    assert PREDICTED not in set().union(*made.values())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_momenta_are_predicted(dtype: torch.dtype, way: Callable[[Path, Path], Path], tmp_path: Path) -> None:
    torch.save(with_momentum(dtype), tmp_path / "x.pt")
    made = methods(way(tmp_path / "x.pt", tmp_path / "made.sc.safetensors"))
    assert made["momentum"] == {PREDICTED}
    assert PREDICTED not in made["weight"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_rank_predicts_them_too(tmp_path: Path) -> None:
    moments = state(torch.bfloat16)["optimizer"]["state"][0]
    saved = {"model": {"w": torch.zeros(300, 200)}, "optim": {"state": {"w": moments}}}
    dcp.save(saved, storage_writer=StatecodecWriter(tmp_path / "dcp"), no_dist=True)
    (file,) = (tmp_path / "dcp").glob("rank-*")
    assert methods(file)["exp_avg"] == {PREDICTED}
    back = {"model": {"w": torch.ones(300, 200)}, "optim": {"state": {"w": {k: x * 0 for k, x in moments.items()}}}}
    dcp.load(back, storage_reader=StatecodecReader(tmp_path / "dcp"), no_dist=True)
    assert torch.allclose(back["optim"]["state"]["w"]["exp_avg"], moments["exp_avg"], atol=1e-4)  # type: ignore[index]


@pytest.mark.parametrize(("pack", "same"), [("predicted", True), ("auto:3", True), ("zstd", False)])
def test_it_is_what_predicted_makes_and_changes_no_number(pack: str, same: bool, tmp_path: Path) -> None:
    torch.save(state(torch.bfloat16), tmp_path / "x.pt")
    contents = []
    for name, options in (("auto", {}), ("other", {"pack": pack})):
        report = statecodec.compress(tmp_path / "x.pt", tmp_path / f"{name}.sc.safetensors", **options)
        statecodec.restore(report.path, tmp_path / f"{name}.pt")
        contents.append((methods(Path(report.path))["exp_avg"] == {PREDICTED}, report))
        assert (tmp_path / f"{name}.pt").read_bytes() == (tmp_path / "auto.pt").read_bytes()
    assert [predicted for predicted, _ in contents] == [True, same]
    auto, other = (report.bytes for _, report in contents)
    assert other == auto if pack == "predicted" else auto < 0.95 * other or same


def test_a_link_is_compared_with_what_a_file_of_its_own_would_be(tmp_path: Path) -> None:
    """The change of two noises is larger than what a prediction leaves of codes, and smaller than codes alone."""
    torch.save(state(torch.bfloat16), tmp_path / "0.pt")
    torch.save(state(torch.bfloat16, noise=2), tmp_path / "1.pt")
    stored = {}
    for pack in ("zstd", "auto"):
        base = statecodec.compress(tmp_path / "0.pt", tmp_path / f"0-{pack}.sc.safetensors", pack=pack, rules=RULES)
        link = statecodec.compress(
            tmp_path / "1.pt", tmp_path / f"1-{pack}.sc.safetensors", base=base.path, pack=pack, rules=RULES
        )
        stored[pack] = {t.role: t.codec.split("(")[0] for t in link.tensors}["exp_avg"]
    assert stored == {"zstd": "delta", "auto": "uniform"}


RULES = ["exp_avg=uniform(step=1e-5)"]


def test_only_moments_count_as_low_rank(tmp_path: Path) -> None:
    torch.save(state(torch.bfloat16), tmp_path / "x.pt")
    with statecodec.open(tmp_path / "x.pt") as checkpoint:
        assert {item.role for item in checkpoint.items if is_low_rank(item)} == {"exp_avg", "exp_avg_sq"}


class Large(TorchDispatchMode):
    """Notes every operation of torch that computes or copies as many elements as it would divide among threads."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        of_memory = {"view", "slice", "select", "detach", "alias", "as_strided", "lift_fresh", "split", "_unsafe_view"}
        most = 2048 if "sqrt" in str(func) else 1 << 15
        if func.overloadpacket.__name__ not in of_memory:
            sizes = [x.numel() for x in args if isinstance(x, torch.Tensor)]
            if max(sizes, default=0) >= most:
                self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_torch_is_given_nothing_that_it_would_divide_among_threads(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.save(state(dtype), tmp_path / "x.pt")
    with Large() as large:
        statecodec.compress(tmp_path / "x.pt", tmp_path / "x.sc.safetensors", threads=1)
        statecodec.restore(tmp_path / "x.sc.safetensors", tmp_path / "back.pt", threads=1)
    assert large.seen == set()
