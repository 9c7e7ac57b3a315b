"""Keys and file names that are not valid Unicode are carried as they are and shown with escapes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

import statecodec
from statecodec.layouts import locate

ODD = "caf\udce9"  # what os.fsdecode makes of latin-1 bytes


def test_keys_with_lone_surrogates(tmp_path: Path) -> None:
    path, packed, back = (tmp_path / n for n in ("m.pt", "m.sc.safetensors", "back.pt"))
    layer = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW([(f"{ODD}.{n}", p) for n, p in layer.named_parameters()])
    layer(torch.ones(4)).sum().backward()
    optimizer.step()
    state = {"model": {f"{ODD}.{n}": p for n, p in layer.state_dict().items()}, "optimizer": optimizer.state_dict()}
    torch.save(state, path)
    report = statecodec.compress(path, packed, verify=True)
    assert {t.param for t in report.tensors} >= {r"caf\udce9.weight", r"caf\udce9.bias"}
    assert all(t.name.isprintable() and t.name.encode() for t in report.tensors)
    statecodec.restore(packed, back)
    assert back.read_bytes() == path.read_bytes()
    for loaded in (statecodec.load(path), statecodec.load(packed)):
        assert list(loaded["model"]) == [f"{ODD}.weight", f"{ODD}.bias"]
    with statecodec.open(packed) as checkpoint:
        assert torch.equal(checkpoint.read(r"model.caf\udce9.bias"), layer.bias)


def test_two_keys_that_look_alike_when_escaped_have_two_names(saved: Any) -> None:
    _, file = saved({"a\udcff": torch.zeros(2), "a\\udcff": torch.ones(2)})
    assert len({v.name for v in file.views}) == 2


def test_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    root, packed, back = tmp_path / "run", tmp_path / "run.sc.safetensors", tmp_path / "back"
    (root / os.fsdecode(b"d\xff")).mkdir(parents=True)
    torch.save({"x": torch.randn(64)}, root / os.fsdecode(b"d\xff") / os.fsdecode(b"\xe9.pt"))
    os.link(root / os.fsdecode(b"d\xff") / os.fsdecode(b"\xe9.pt"), root / os.fsdecode(b"z\xe8"))
    (root / r"\udcff").write_bytes(b"the escaped spelling itself")
    report = statecodec.compress(root, packed, verify=True)
    assert r"d\udcff|\udce9.pt:x" in [t.name for t in report.tensors]
    statecodec.restore(packed, back)
    for source in locate(root).files:
        assert (back / source.path).read_bytes() == (root / source.path).read_bytes()
    assert [f.path for f in locate(back).files] == [f.path for f in locate(root).files]
    assert (back / os.fsdecode(b"z\xe8")).stat().st_nlink == 2


def test_a_single_file_whose_name_is_not_utf8(tmp_path: Path) -> None:
    path, packed = tmp_path / os.fsdecode(b"\xe9.pt"), tmp_path / "m.sc.safetensors"
    torch.save({"x": torch.randn(64)}, path)
    statecodec.compress(path, packed)
    content = path.read_bytes()
    path.unlink()
    statecodec.restore(packed)
    assert path.read_bytes() == content
