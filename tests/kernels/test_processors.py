"""Compressing on a card gives the file that compressing on the CPU gives, byte for byte; when it is worth it.

Without a card the same code runs on CPU tensors: Triton's interpreter for the kernels, a lock for the streams, because
the interpreter takes one launch at a time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("zstandard")  # a machine for GPU tests may lack what files are written with
pytest.importorskip("zlib_ng")

import statecodec
from statecodec import codecs
from statecodec.errors import BackendUnavailable
from statecodec.verbs import processors
from statecodec.verbs.processors import Cpu, Cuda, is_faster, processor

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

_one_launch = threading.RLock()
SHAPES = {"wide.weight": (3, 9_000), "tall.weight": (70, 48), "odd.weight": (5, 3, 7), "bias": (48,)}


class OneAtATime:
    """Streams where there are none."""

    def __init__(self, device: torch.device) -> None:
        self.entered = set[str]()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        self.entered.add(threading.current_thread().name)
        with _one_launch:
            yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fp32 masters with bf16 weights and moments, one tensor that its codec refuses."""
    torch.manual_seed(0)
    masters = {name: torch.randn(shape) / 30 for name, shape in SHAPES.items()}
    state = {
        i: {"step": torch.tensor(9.0), "exp_avg": torch.randn(s) / 1e3, "exp_avg_sq": torch.rand(s) / 1e6}
        for i, s in enumerate(SHAPES.values())
    }
    state[1]["exp_avg_sq"][0, 0] = torch.nan
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "params": list(range(len(SHAPES)))}
    path = tmp_path_factory.mktemp("processors") / "ckpt.pt"
    model = {name: weight.bfloat16() for name, weight in masters.items()}
    optimizer = {"state": state, "param_groups": [group]}
    torch.save({"model": model, "master": masters, "optimizer": optimizer}, path)
    return path


@pytest.fixture
def on_card(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """The card that `device="cuda"` means in this test."""
    card = Cuda(device, OneAtATime) if device.type == "cpu" else Cuda()
    monkeypatch.setattr("statecodec.verbs.compress.processor", lambda name, *_: {"cuda": card, "cpu": Cpu()}[name])
    return card


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({"preset": "resume"}, id="resume"),
        pytest.param({"preset": "live"}, id="live"),
        pytest.param({"rules": ["*exp_avg*=lowrank(rank=2)", "*weight=split(low_bits=16)"]}, id="lowrank"),
        pytest.param({"rules": ["*exp_avg_sq*=shared(dims=[1])", "*exp_avg*=folded(level=2)"]}, id="means"),
    ],
)
def test_a_card_writes_the_bytes_of_the_cpu(how: Any, checkpoint: Path, tmp_path: Path, on_card: Cuda) -> None:
    files = {}
    for device in ("cpu", "cuda"):
        files[device] = tmp_path / f"{device}.sc.safetensors"
        statecodec.compress(checkpoint, files[device], device=device, threads=2, **how)
    assert files["cpu"].read_bytes() == files["cuda"].read_bytes()
    if isinstance(on_card._lane, OneAtATime):
        assert on_card._lane.entered, "nothing went to the card"


@pytest.mark.parametrize("spec", ["shared(dims=[1])", "lowrank(rank=2)"])
def test_what_torch_computes_otherwise_on_a_card_stays_on_the_cpu(spec: str, device: torch.device) -> None:
    lane = OneAtATime(device)
    card, x, codec = Cuda(device, lambda _: lane), torch.rand(6, 40), codecs.parse(spec)
    parts, _ = card.encode(codec, x, {})
    assert all(torch.equal(part, codec.encode(x).parts[name]) for name, part in parts.items())
    card.decoded(codec, x)
    assert not lane.entered


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_restoring_on_a_card(checkpoint: Path, tmp_path: Path) -> None:
    packed = tmp_path / "ckpt.sc.safetensors"
    statecodec.compress(checkpoint, packed, device="cuda")
    for device in ("cpu", "cuda"):
        statecodec.restore(packed, tmp_path / f"{device}.pt", device=device)
    assert (tmp_path / "cpu.pt").read_bytes() == (tmp_path / "cuda.pt").read_bytes()


def test_no_card_is_said_so(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statecodec.compress(checkpoint, tmp_path / "made")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for verb, source in ((statecodec.compress, checkpoint), (statecodec.restore, tmp_path / "made")):
        with pytest.raises(BackendUnavailable, match="no CUDA device here; use --device cpu"):
            verb(source, tmp_path / "out", device="cuda")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_auto_is_the_cpu_for_what_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without even asking for a card, which takes longer than the work."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked"))
    assert isinstance(processor("auto", processors._WORTH - 1, 4), Cpu)


@pytest.mark.parametrize(("on_the_card", "threads", "worth"), [(0.2, 4, True), (0.3, 4, False), (0.3, 2, True)])
def test_auto_takes_a_card_that_is_seen_to_be_faster(
    on_the_card: float, threads: int, worth: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def taking(seconds: float) -> Callable[..., tuple[dict[str, Tensor], None]]:
        def encode(*_: Any) -> tuple[dict[str, Tensor], None]:
            nonlocal now
            now += seconds
            return {}, None

        return encode

    card, cpu = Cpu(), Cpu()
    monkeypatch.setattr(card, "encode", taking(on_the_card))
    monkeypatch.setattr(cpu, "encode", taking(1.0))
    monkeypatch.setattr("time.perf_counter", lambda: now)
    assert is_faster(card, cpu, threads) is worth
    for name, value in (("Cuda", lambda: card), ("Cpu", lambda: cpu)):
        monkeypatch.setattr(processors, name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (processor("auto", processors._WORTH, threads) is card) is worth
