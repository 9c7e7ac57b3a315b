"""compress and restore, on real files, against torch.load and the files' own bytes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import statecodec
from statecodec.checkpoint import document as documents
from statecodec.errors import (
    FormatError,
    MalformedCheckpoint,
    OutputExists,
    StatecodecError,
    UnsupportedVersion,
    UsageError,
    VerificationFailed,
)
from statecodec.layouts import Folder

PRESETS = ("lossless", "resume", "small", "tiny", "live", "weights")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def there_and_back(path: Path, **options: Any) -> tuple[statecodec.Report, Path]:
    packed, back = path.parent / "packed.sc.safetensors", path.parent / f"back-{path.name}"
    report = statecodec.compress(path, packed, force=True, **options)
    statecodec.restore(packed, back, force=True)
    return report, back


def test_a_prediction_makes_the_file_smaller_and_changes_no_number(tmp_path: Path) -> None:
    """Moments of a few batches are of low rank."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, 4, generator=generator) for n in (300, 200))
    m = left @ right.T + 0.3 * torch.randn(300, 200, generator=generator)
    v = m.square() * 0.1 + 1.0
    state = {"step": torch.tensor(9.0), "exp_avg": m * 1e-3, "exp_avg_sq": v * 1e-6}
    group = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "params": [0]}
    optimizer = {"state": {0: state}, "param_groups": [group]}
    torch.save({"model": {"w": torch.randn(300, 200, generator=generator)}, "optimizer": optimizer}, tmp_path / "x.pt")
    plain, back = there_and_back(tmp_path / "x.pt")
    content = sha256(back)
    predicted, back = there_and_back(tmp_path / "x.pt", pack="predicted")
    assert sha256(back) == content
    assert predicted.total == plain.total
    assert predicted.bytes < 0.93 * plain.bytes


@pytest.mark.parametrize("pack", ["zstd", "none", "zstd:3", "predicted:3"])
def test_lossless_restores_the_same_file(checkpoint: Path, pack: str) -> None:
    report, back = there_and_back(checkpoint, preset="lossless", pack=pack)
    assert sha256(back) == sha256(checkpoint) == report.source["sha256"]


@pytest.mark.parametrize(
    ("options", "stored"),
    [
        ({"preset": "resume"}, False),
        ({"preset": "weights"}, False),
        ({"preset": "live", "sha256": True}, True),
        ({"preset": "lossless"}, True),
        ({"preset": "lossless", "sha256": False}, False),
        ({"preset": "lossless", "rules": ["exp_avg=companded"]}, False),
        ({"preset": "lossless", "rules": ["exp_avg=raw"]}, True),
        ({"preset": "lossless", "max_weight_error": 0.1}, False),
    ],
)
def test_the_sha256_is_stored_where_the_restored_file_must_have_it(
    checkpoint: Path, options: dict[str, Any], stored: bool
) -> None:
    report, _ = there_and_back(checkpoint, **options)
    assert report.source["sha256"] == (sha256(checkpoint) if stored else None)


@pytest.mark.parametrize("preset", PRESETS)
def test_restored_files_load_and_resume(checkpoint: Path, content: dict[str, Any], preset: str) -> None:
    report, back = there_and_back(checkpoint, preset=preset)
    assert zipfile.ZipFile(back).testzip() is None, "a CRC is wrong"
    loaded = torch.load(back, weights_only=False)
    assert loaded["config"]["path"] == Path("data/x")
    assert loaded["model"]["wte.weight"].data_ptr() == loaded["model"]["head.weight"].data_ptr()
    parameters = [nn.Parameter(torch.empty_like(s["exp_avg"])) for s in content["optimizer"]["state"].values()]
    sizes = [len(g["params"]) for g in content["optimizer"]["param_groups"]]
    optimizer = torch.optim.AdamW([{"params": parameters[: sizes[0]]}, {"params": parameters[sizes[0] :]}])
    optimizer.load_state_dict(loaded["optimizer"])
    diff = statecodec.diff(checkpoint, back)
    updates = {"lossless": 0.0, "resume": 0.01, "small": 0.1, "tiny": 0.16, "live": 0.012, "weights": 1.0}
    weights = {"lossless": 0.0, "resume": 0.02, "small": 0.3, "tiny": 0.64, "live": 0.012, "weights": 0.0}
    assert diff.total["u_rms"] <= updates[preset] * 1.001
    assert diff.total["weight_step_error"] <= weights[preset] * 1.001
    assert report.bytes < checkpoint.stat().st_size


@pytest.mark.parametrize("preset", PRESETS)
def test_the_report_says_what_happened(checkpoint: Path, preset: str) -> None:
    report = statecodec.compress(checkpoint, preset=preset, verify=True)
    assert report.path == str(checkpoint.parent / "ckpt.sc.safetensors")
    assert report.bytes == Path(report.path).stat().st_size
    inspected = statecodec.inspect(report.path)
    assert inspected.tensors == report.tensors
    assert inspected.source == report.source
    document = report.to_json()
    for key in ("format_version", "source", "bytes", "ratio", "bytes_per_param", "num_params", "tensors"):
        assert document[key] is not None
    model, _ = torch.load(checkpoint, weights_only=False), None
    names = {k: v for k, v in model["model"].items() if k != "head.weight"}
    assert report.num_params == sum(v.numel() for v in names.values())
    roles = {t.name: t.role for t in report.tensors}
    assert roles["model.wte.weight"] == "weight"
    assert roles["optimizer.state.0.exp_avg_sq"] == "exp_avg_sq"
    assert roles["optimizer.state.0.step"] == "step"
    measured = statecodec.diff(checkpoint, report.path)
    for tensor in report.tensors:
        if tensor.error is not None:
            found = next(t for t in measured.tensors if t.name == tensor.name)
            for figure in tensor.error.keys() & {"rms", "max_abs"}:
                assert tensor.error[figure] == pytest.approx(getattr(found, figure), rel=1e-6)
            if tensor.role == "weight" and "step_error" in tensor.error:
                assert tensor.error["step_error"] == pytest.approx(found.step_error, rel=0.02)
    assert report.total is not None
    assert report.total["u_rms"] == pytest.approx(measured.total["u_rms"])


def test_diff_against_float64(checkpoint: Path, content: dict[str, Any]) -> None:
    """u-rms, max |u| and cosine against the formula in float64, tensor by tensor and in total."""
    _, back = there_and_back(checkpoint, preset="small")
    other = torch.load(back, weights_only=False)["optimizer"]["state"]
    diff = statecodec.diff(checkpoint, back)
    exact, found = [], []
    for i, state in content["optimizer"]["state"].items():
        for target, s in ((exact, state), (found, other[i])):
            t = float(state["step"])
            m, v = (s[k].double() for k in ("exp_avg", "exp_avg_sq"))
            target.append((m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8))
    u, w = torch.cat([x.flatten() for x in exact]), torch.cat([x.flatten() for x in found])
    assert diff.total["u_rms"] == pytest.approx(float((w - u).norm() / u.norm()), rel=1e-4)
    assert diff.total["max_u"] == pytest.approx(float(w.abs().max()), rel=1e-5)
    assert diff.total["max_u_exact"] == pytest.approx(float(u.abs().max()), rel=1e-5)
    assert diff.total["cosine"] == pytest.approx(float(torch.nn.functional.cosine_similarity(u, w, 0)), abs=1e-7)
    assert len(diff.updates) == len(exact)


def test_load_gives_what_torch_load_gives(checkpoint: Path, content: dict[str, Any]) -> None:
    statecodec.compress(checkpoint, preset="lossless")
    for path in (checkpoint, checkpoint.parent / "ckpt.sc.safetensors"):
        loaded = statecodec.load(path)
        assert list(loaded) == list(content)
        assert loaded["iter_num"] == 12
        for k, v in content["model"].items():
            assert torch.equal(loaded["model"][k], v)
        for i, state in content["optimizer"]["state"].items():
            for k, v in state.items():
                assert torch.equal(loaded["optimizer"]["state"][i][k], v)
        assert loaded["optimizer"]["param_groups"] == content["optimizer"]["param_groups"]
        assert "Path" in loaded["config"]["path"].name
        assert torch.equal(loaded["config"]["rng"], content["config"]["rng"])


def test_open_reads_one_tensor(checkpoint: Path, content: dict[str, Any]) -> None:
    statecodec.compress(checkpoint)
    with statecodec.open(checkpoint.parent / "ckpt.sc.safetensors") as f:
        assert "model.head.weight" in f.names()
        m = f.read("optimizer.state.0.exp_avg")
        assert m.shape == content["optimizer"]["state"][0]["exp_avg"].shape
        assert f.info("optimizer.state.0.exp_avg")["codec"]["name"] == "direction"
        assert f.read_encoded("optimizer.state.0.exp_avg").decode().equal(m)
        with pytest.raises(UsageError, match="wte"):
            f.read("wte.weight")


def test_strided_shared_and_odd_tensors(tmp_path: Path) -> None:
    base = torch.randn(100, 70)
    content = {
        "whole": base,
        "transposed": torch.randn(90, 80).t(),
        "window": torch.randn(64, 64)[3:9, 5:],
        "again": base.view(70, 100),
        "overlap": base.view(-1)[5:300],
        "expanded": torch.randn(3, 1).expand(3, 5),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
        "bool": torch.rand(9) > 0.5,
        "complex": torch.randn(4, dtype=torch.complex64),
        "double": torch.randn(80, 60, dtype=torch.float64),
        "half": torch.randn(70, 70).half(),
        "bf16": torch.randn(70, 70).bfloat16(),
        "int": torch.arange(5000),
        "last": torch.randn(4, 8, 6, 5).to(memory_format=torch.channels_last),
        "fp8": torch.randn(50).to(torch.float8_e4m3fn),
        "numpy": np.random.default_rng(0).normal(size=10),
    }
    path = tmp_path / "odd.pt"
    torch.save(content, path)
    _, back = there_and_back(path, preset="lossless")
    assert sha256(back) == sha256(path)
    there_and_back(path, preset="tiny", rules=["*=companded(bits=4)"])
    lossy = torch.load(back, weights_only=False)
    for name in ("whole", "again", "overlap", "bool", "int", "fp8", "complex"):
        assert torch.equal(
            lossy[name].view(-1).contiguous().view(torch.uint8), content[name].view(-1).contiguous().view(torch.uint8)
        ), name
    loaded = statecodec.load(tmp_path / "packed.sc.safetensors")
    assert loaded["transposed"].stride() == content["transposed"].stride()
    assert (loaded["transposed"] - content["transposed"]).abs().max() < 0.6


def test_nan_infinity_and_negative_moments_are_kept_and_named(tmp_path: Path) -> None:
    state = {
        i: {"step": torch.tensor(3.0), "exp_avg": torch.randn(80, 80), "exp_avg_sq": torch.rand(80, 80)}
        for i in range(4)
    }
    state[0]["exp_avg"][5, 5] = float("nan")
    state[1]["exp_avg_sq"][0, 0] = float("inf")
    state[2]["exp_avg_sq"][7, 7] = -1e-9
    model = {f"w{i}": torch.randn(80, 80) for i in range(4)}
    model["w3"][1, 1] = float("nan")
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "params": [0, 1, 2, 3]}
    path = tmp_path / "bad.pt"
    torch.save({"model": model, "optimizer": {"state": state, "param_groups": [group]}}, path)
    report, back = there_and_back(path, verify=True)
    loaded = torch.load(back)
    for i, key in ((0, "exp_avg"), (1, "exp_avg_sq"), (2, "exp_avg_sq")):
        assert torch.equal(loaded["optimizer"]["state"][i][key].view(torch.int32), state[i][key].view(torch.int32))
        assert any(f"state.{i}.{key}" in note for note in report.notes), report.notes
    assert loaded["model"]["w3"][1, 1].isnan()
    assert next(t for t in report.tensors if t.name == "optimizer.state.3.exp_avg").codec.startswith("direction")


def test_safetensors_and_sharded_output(tmp_path: Path) -> None:
    tensors = {f"layer.{i}.weight": torch.randn(300, 100).bfloat16() for i in range(8)}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, {"format": "pt"})
    packed = tmp_path / "out.sc.safetensors"
    report = statecodec.compress(path, packed, preset="lossless", max_shard_size="200KB")
    assert len(report.files) > 1
    assert not packed.exists()
    for name in (packed, tmp_path / "out.sc.safetensors.index.json"):
        back = tmp_path / "back.safetensors"
        statecodec.restore(name, back, force=True)
        assert sha256(back) == sha256(path)
    assert torch.equal(statecodec.load(packed)["layer.3.weight"], tensors["layer.3.weight"])
    for shard in report.files:
        load_file(shard)
    with pytest.raises(OutputExists):
        statecodec.compress(path, packed)


def test_directory(tmp_path: Path, content: dict[str, Any]) -> None:
    root = tmp_path / "checkpoint-12"
    (root / "sub" / "empty").mkdir(parents=True)
    save_file({k: v for k, v in content["model"].items() if k != "head.weight"}, root / "model.safetensors")
    torch.save(content["optimizer"], root / "optimizer.pt")
    (root / "trainer_state.json").write_text('{"global_step": 12}')
    (root / "rng_state.pth").write_bytes(os.urandom(5000))
    (root / "zero").touch()
    (root / "trainer_state.json").chmod(0o640)
    os.link(root / "optimizer.pt", root / "sub" / "same.pt")
    report, back = there_and_back(root, preset="lossless", verify=True)
    assert report.source["layout"] == "directory"
    for path in sorted(root.rglob("*")):
        twin = back / path.relative_to(root)
        assert twin.is_dir() == path.is_dir()
        if path.is_file():
            assert twin.read_bytes() == path.read_bytes(), path
            assert twin.stat().st_mode == path.stat().st_mode
    assert (back / "sub" / "same.pt").stat().st_ino == (back / "optimizer.pt").stat().st_ino
    report, back = there_and_back(root, preset="resume")
    diff = statecodec.diff(root, back)
    assert 0 < diff.total["u_rms"] < 0.012
    loaded = statecodec.load(tmp_path / "packed.sc.safetensors")
    assert loaded["trainer_state.json"] == b'{"global_step": 12}'
    assert torch.equal(loaded["model.safetensors"]["ln.bias"], content["model"]["ln.bias"])


def test_outputs_need_force_and_errors_leave_nothing(checkpoint: Path) -> None:
    statecodec.compress(checkpoint)
    packed = checkpoint.parent / "ckpt.sc.safetensors"
    before = sorted(p.name for p in checkpoint.parent.iterdir())
    with pytest.raises(OutputExists):
        statecodec.compress(checkpoint)
    with pytest.raises(OutputExists):
        statecodec.restore(packed, checkpoint)

    def stop(done: int, total: int, stage: str) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        statecodec.compress(checkpoint, checkpoint.parent / "new.sc.safetensors", progress=stop)
    with pytest.raises(KeyboardInterrupt):
        statecodec.restore(packed, checkpoint.parent / "new.pt", progress=stop)
    assert sorted(p.name for p in checkpoint.parent.iterdir()) == before


def test_verify_against_another_original(checkpoint: Path, content: dict[str, Any]) -> None:
    statecodec.compress(checkpoint)
    packed = checkpoint.parent / "ckpt.sc.safetensors"
    statecodec.verify(packed, against=checkpoint)
    other = torch.load(checkpoint, weights_only=False)
    other["model"]["fc.weight"][0, 0] += 1e-3
    torch.save(other, checkpoint)
    with pytest.raises(VerificationFailed, match=r"fc\.weight|SHA-256"):
        statecodec.verify(packed, against=checkpoint)


@pytest.mark.parametrize(
    ("name", "hashed", "complaint"),
    [("x.safetensors", None, None), ("x.safetensors", True, "SHA-256"), ("x.pt", None, "bytes that are not tensors")],
)
def test_verify_against_one_changed_bit(tmp_path: Path, name: str, hashed: bool | None, complaint: str | None) -> None:
    """By its errors alone the changed original is as good as the first; a SHA-256 or a zip's CRCs know better."""
    source, packed = tmp_path / name, tmp_path / "x.sc.safetensors"
    save = save_file if name.endswith(".safetensors") else torch.save
    weights = {"w": torch.randn(64, 128, generator=torch.Generator().manual_seed(0))}
    save(weights, source)
    statecodec.compress(source, packed, rules=["*=uniform(step=0.01)"], sha256=hashed)
    statecodec.verify(packed, against=source)
    weights["w"].view(torch.int32)[0, 0] ^= 1
    save(weights, source)
    with contextlib.nullcontext() if complaint is None else pytest.raises(VerificationFailed, match=complaint):
        statecodec.verify(packed, against=source)


def test_bit_flips_never_decode_to_other_numbers(checkpoint: Path) -> None:
    """Of random single-bit flips in our file, none may restore to anything but an error or the very same bytes."""
    packed, back = checkpoint.parent / "p.sc.safetensors", checkpoint.parent / "b.pt"
    statecodec.compress(checkpoint, packed)
    statecodec.restore(packed, back)
    good, intact = sha256(back), packed.read_bytes()
    rng = np.random.default_rng(0)
    silent = 0
    for _ in range(150):  # `make fuzz` and tests/format run thousands more on the format itself
        damaged = bytearray(intact)
        damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
        packed.write_bytes(damaged)
        try:
            statecodec.restore(packed, back, force=True)
        except StatecodecError:
            continue
        silent += sha256(back) != good
    assert silent == 0


def test_a_damaged_source_is_refused(checkpoint: Path) -> None:
    """torch.load takes a flipped bit in a tensor without a word; its zip's CRC knows better."""
    data = bytearray(checkpoint.read_bytes())
    with zipfile.ZipFile(checkpoint) as z:
        largest = max(z.infolist(), key=lambda i: i.file_size)
    data[largest.header_offset + 1000] ^= 4
    checkpoint.write_bytes(data)
    torch.load(checkpoint, weights_only=False)
    for options in ({}, {"sha256": True}):
        with pytest.raises(MalformedCheckpoint, match="CRC-32"):
            statecodec.compress(checkpoint, **options)
    assert not list(checkpoint.parent.glob("*.sc.*"))


def test_memory_stays_bounded(tmp_path: Path) -> None:
    """A 400 MB tensor goes through in far less memory than its own size."""
    path = tmp_path / "big.pt"
    torch.save({"model": {"w": torch.zeros(100_000_000)}, "x": torch.randn(10)}, path)
    program = (
        "import sys, re, statecodec, torch\n"
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) // 1024\n"
        "torch_alone = peak()\n"
        "statecodec.compress(sys.argv[1], sys.argv[2], threads=2)\n"
        "statecodec.restore(sys.argv[2], sys.argv[3], threads=2)\n"
        "print(peak() - torch_alone)"
    )
    arguments = [str(path), str(tmp_path / "big.sc.safetensors"), str(tmp_path / "back.pt")]
    result = subprocess.run([sys.executable, "-c", program, *arguments], check=True, capture_output=True, text=True)
    assert int(result.stdout) < 370, f"{result.stdout} MiB beside what torch takes"
    assert sha256(tmp_path / "back.pt") == sha256(path)


def test_unknown_preset_and_sizes(checkpoint: Path) -> None:
    for options in (
        {"preset": "best"},
        {"pack": "lz4"},
        {"max_shard_size": "5 apples"},
        {"device": "tpu"},
        {"rules": ["x"]},
    ):
        with pytest.raises(StatecodecError):
            statecodec.compress(checkpoint, **options)
    assert not list(checkpoint.parent.glob("*.sc.*"))


def test_a_newer_format_is_refused(checkpoint: Path) -> None:
    statecodec.compress(checkpoint)
    packed = checkpoint.parent / "ckpt.sc.safetensors"
    data = packed.read_bytes().replace(b'"statecodec.version":"2.2"', b'"statecodec.version":"3.0"')
    packed.write_bytes(data)
    with pytest.raises(UnsupportedVersion):
        statecodec.load(packed)


def test_moments_that_span_many_octaves_keep_their_update(tmp_path: Path) -> None:
    """Behind dead units a row spans fifty octaves: 8-bit codes would lose the smaller updates.

    Their direction counts as well.
    """
    torch.manual_seed(0)
    reach = 2.0 ** -(40 * torch.rand(96, 256))
    state = {
        "step": torch.tensor(50.0),
        "exp_avg": torch.randn(96, 256) * reach.sqrt(),
        "exp_avg_sq": reach * torch.rand(96, 256).clamp(min=0.1),
    }
    group = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-12, "weight_decay": 0.0, "params": [0]}
    path = tmp_path / "wide.pt"
    torch.save(
        {"model": {"w": torch.randn(96, 256)}, "optimizer": {"state": {0: state}, "param_groups": [group]}}, path
    )
    report, back = there_and_back(path)
    assert statecodec.diff(path, back).total["u_rms"] < 0.01001
    chosen = {t.role: t.codec.split("(")[0] for t in report.tensors}
    assert (chosen["exp_avg"], chosen["exp_avg_sq"]) == ("direction", "logarithmic")
    assert not report.notes
    rules = ["exp_avg=companded(group=64)", "exp_avg_sq=companded(curve=log,per_octave=18)"]
    report, back = there_and_back(path, rules=rules)
    assert statecodec.diff(path, back).total["u_rms"] > 0.1, "the preset's own codes would have done"
    assert not any("kept exact" in note for note in report.notes)


def test_a_compressed_file_is_not_compressed_again(checkpoint: Path) -> None:
    packed = Path(statecodec.compress(checkpoint).path)
    with pytest.raises(UsageError, match="already"):
        statecodec.compress(packed)
    with pytest.raises(UsageError, match="itself"):
        statecodec.compress(checkpoint, checkpoint, force=True)
    torch.load(checkpoint, weights_only=False)


def test_modes_and_times_of_files_and_directories(tmp_path: Path) -> None:
    root, packed = tmp_path / "run", tmp_path / "run.sc.safetensors"
    (root / "inner" / "deep").mkdir(parents=True)
    torch.save({"x": torch.ones(9)}, root / "inner" / "deep" / "m.pt")
    (root / "inner" / "deep" / "m.pt").chmod(0o640)
    for path, mode in ((root / "inner" / "deep", 0o500), (root / "inner", 0o711), (root, 0o700)):
        path.chmod(mode)
    paths = [root, *root.rglob("*")]
    for i, path in enumerate(paths):
        os.utime(path, ns=(0, 1_600_000_000_123_456_789 + i))
    statecodec.compress(root, packed)
    for times in (False, True):
        back = tmp_path / f"back-{times}"
        statecodec.restore(packed, back, times=times)
        for path in paths:
            before, after = path.stat(), (back / path.relative_to(root)).stat()
            assert after.st_mode == before.st_mode, path
            assert (after.st_mtime_ns == before.st_mtime_ns) is times, path


def test_a_restored_file_has_its_time_where_asked(checkpoint: Path, tmp_path: Path) -> None:
    os.utime(checkpoint, ns=(0, 1_600_000_000_123_456_789))
    statecodec.compress(checkpoint, tmp_path / "c.sc.safetensors")
    statecodec.restore(tmp_path / "c.sc.safetensors", tmp_path / "back.pt", times=True)
    assert (tmp_path / "back.pt").stat().st_mtime_ns == 1_600_000_000_123_456_789


DIRECTORY = documents.Document(
    "test", None, (), {"layout": "directory", "bytes": 0}, (), (Folder("", 0o700, 5), Folder("sub", 0o711, 6)), ()
)


def test_documents_without_modes_of_directories_still_restore() -> None:
    """Files of the first release state no modes and no times of directories."""
    value = documents.to_json(DIRECTORY)
    assert documents.from_json(value, []).folders == DIRECTORY.folders
    del value["directory_modes"], value["directory_times"]
    assert documents.from_json(value, []).folders == (Folder("", None, None), Folder("sub", None, None))


@pytest.mark.parametrize(
    "change",
    [{"asked": bad} for bad in ([], {"u_rms": 0.0}, {"u_rms": "1"}, {"u_rms": 2.0}, {"other": 0.1})]
    + [{"directory_modes": [0]}, {"directory_modes": [0, -1]}, {"directory_times": [0, 1 << 64]}, {"directories": [{}]}]
    + [{"directories": [{"bytes": bad}]} for bad in ("2e2e", "zz", "2f61", "", 5)],
    ids=str,
)
def test_hostile_documents_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        documents.from_json({**documents.to_json(DIRECTORY), **change}, [])
