"""torch's default dtype and device belong to the user: they change nothing here.

Every verb runs under other defaults and must write the same bytes and say the same things; and every call that makes
a tensor says what it makes, so that this holds for what the verbs here do not reach.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import statecodec
from statecodec import optim
from tests.optim.helpers import bits, parameters, run


@contextmanager
def _dtype(dtype: torch.dtype) -> Iterator[None]:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


DEFAULTS: dict[str, Callable[[], Any]] = {
    "bf16": lambda: _dtype(torch.bfloat16),
    "fp16": lambda: _dtype(torch.float16),
    "fp64": lambda: _dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of one run, the second one also of a live optimizer and in safetensors."""
    folder = tmp_path_factory.mktemp("checkpoints")
    params = parameters()
    optimizer = torch.optim.AdamW(params.items(), lr=1e-3)
    for name, steps in (("a.pt", range(3)), ("b.pt", range(3, 5))):
        run(optimizer, params, steps)
        model = {k: p.detach() for k, p in params.items()}
        torch.save({"model": model, "optimizer": optimizer.state_dict(), "none": torch.empty(0)}, folder / name)
    live = optim.AdamW(params.items(), dense_below=0)
    run(live, params, range(2))
    torch.save({"model": model, "optimizer": live.state_dict()}, folder / "live.pt")
    return folder


def everything(source: Path, out: Path) -> dict[str, Any]:
    """Run every verb; what they wrote and said, without what depends on the place and the time."""
    out.mkdir()
    said: dict[str, Any] = {}
    for preset in ("lossless", "resume", "small", "tiny", "weights"):
        said[preset] = statecodec.compress(source / "a.pt", out / f"{preset}.sc.safetensors", preset=preset)
    rules = ["exp_avg=companded", "exp_avg_sq=shared(dims=[0])", "a.weight=lowrank(rank=4)", "weight=split"]
    said["rules"] = statecodec.compress(source / "b.pt", out / "rules.sc.safetensors", rules=rules)
    said["folded"] = statecodec.compress(source / "b.pt", out / "folded.sc.safetensors", rules=["exp_avg=folded"])
    said["base"] = statecodec.compress(
        source / "b.pt", out / "chain.sc.safetensors", base=out / "resume.sc.safetensors"
    )
    said["live"] = statecodec.compress(source / "live.pt", out / "live.sc.safetensors", verify=True)
    said["verify"] = statecodec.verify(out / "chain.sc.safetensors")
    said["against"] = statecodec.verify(out / "resume.sc.safetensors", source / "a.pt")
    said["inspect"] = statecodec.inspect(source / "b.pt")
    said["diff"] = statecodec.diff(source / "a.pt", out / "small.sc.safetensors")
    said["analyze"] = statecodec.analyze(source / "b.pt")
    statecodec.restore(out / "chain.sc.safetensors", out / "chain.pt")
    statecodec.restore(out / "rules.sc.safetensors", out / "rules.pt")
    loaded = [statecodec.load(p) for p in (source / "a.pt", out / "tiny.sc.safetensors", out / "chain.sc.safetensors")]
    with statecodec.open(out / "rules.sc.safetensors") as checkpoint:
        loaded += [checkpoint.read(name) for name in checkpoint.names()]
    for to in ("foam(level=1)", "slimadam(rules=None)", "lorapre(rank=4)", "adamw", "exp_avg_sq=shared(dims=[1])"):
        said[to] = statecodec.convert(source / "b.pt", out / f"{to[:4]}.safetensors", to)
    said["torch"] = statecodec.convert(source / "live.pt", out / "torch.pt", "torch")
    statecodec.save(loaded[0], out / "saved.sc.safetensors")
    return {
        "files": {p.name: p.read_bytes() for p in sorted(out.iterdir())},
        "loaded": bits(loaded),
        "said": {k: _anywhere(v.to_json(), out) for k, v in said.items()},
    }


def _anywhere(document: dict[str, Any], out: Path) -> Any:
    document = json.loads(json.dumps(document).replace(str(out), ""))
    return {k: v for k, v in document.items() if k != "seconds"}


@pytest.fixture(scope="module")
def usual(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return everything(folder, tmp_path_factory.mktemp("usual") / "out")


@pytest.mark.parametrize("default", DEFAULTS)
def test_every_verb_does_the_same_under_any_default(
    default: str, folder: Path, usual: dict[str, Any], tmp_path: Path
) -> None:
    with DEFAULTS[default]():
        found = everything(folder, tmp_path / "out")
    assert found["said"] == usual["said"]
    assert [k for k, v in found["files"].items() if v != usual["files"].get(k)] == []
    assert found["files"].keys() == usual["files"].keys()
    assert found["loaded"] == usual["loaded"]


MAKERS = {"arange", "as_tensor", "asarray", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn",
          "randperm", "scalar_tensor", "tensor", "zeros"}  # fmt: skip
INTEGERS = {"arange", "randperm"}  # of integers, which have no default to go by


def test_everything_that_makes_a_tensor_says_its_dtype_and_device() -> None:
    root = Path(statecodec.__file__).parent
    silent = []
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr=name)) if name in MAKERS:
                    said = {k.arg for k in node.keywords} | ({"dtype"} if name in INTEGERS else set())
                    if not {"dtype", "device"} <= said:
                        silent.append(f"{path.relative_to(root)}:{node.lineno}: {ast.unparse(node)}")
    assert silent == []
