"""Quantised states of other optimizers: named, kept to the bit, and made into what torch and statecodec resume from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import statecodec
from statecodec.checkpoint.source import SourceCheckpoint
from statecodec.choose import step_size
from statecodec.errors import MalformedCheckpoint, StatecodecError, UsageError
from statecodec.verbs.quantised import dense
from tests.frameworks.quantised import WRITERS, Quantised, model, write_bitsandbytes, write_flashoptim


@pytest.fixture(scope="module", params=list(WRITERS))
def quantised(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Quantised:
    return WRITERS[request.param](tmp_path_factory.mktemp("quantised"))


def test_states_are_named_by_role_and_bits(quantised: Quantised) -> None:
    report = statecodec.inspect(quantised.path)
    names = [name for name, _ in model().named_parameters()]
    for i, name in enumerate(names):
        for key in ("exp_avg", "exp_avg_sq"):
            own = f"optimizer.state.{i}.{key}"
            encoded = {t.state for t in report.tensors if t.state is not None and t.state.name == own}
            if encoded:
                (state,) = encoded
                assert (state.role, state.codec) == (key, f"{quantised.package}(bits={quantised.bits})")
                assert state.shape == tuple(quantised.states[i][key].shape)
                held = [t for t in report.tensors if t.state == state]
            else:
                held = [t for t in report.tensors if t.role == key and f".state.{i}." in t.name]
            assert held, own
            assert {t.param for t in held if "qmap" not in t.name} == {name}
    assert any(t.state is not None for t in report.tensors)
    package = {"flashoptim": "FlashOptim"}.get(quantised.package, quantised.package)
    assert report.source["framework"] == f"{package}, {quantised.bits}-bit states"


@pytest.mark.parametrize("preset", ["lossless", "resume"])
def test_they_are_kept_to_the_bit(quantised: Quantised, preset: str, tmp_path: Path) -> None:
    packed, back = tmp_path / "packed.sc.safetensors", tmp_path / "back.pt"
    made = statecodec.compress(quantised.path, packed, preset=preset)
    kept = [t for t in made.tensors if t.state is not None]
    assert kept
    assert {t.codec.partition("(")[0] for t in kept} == {"raw"}
    shown = {(t.name, t.state) for t in statecodec.inspect(packed).tensors if t.state is not None}
    assert shown == {(t.name, t.state) for t in kept}
    statecodec.restore(packed, back)
    if preset == "lossless":
        assert back.read_bytes() == quantised.path.read_bytes()
    else:
        before, after = (statecodec.open(path) for path in (quantised.path, back))
        with before, after:
            assert all(torch.equal(before.read(t.name), after.read(t.name)) for t in kept)


def test_they_are_decoded_piece_by_piece(quantised: Quantised, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_size, "_PIECE", 2048)
    with SourceCheckpoint(quantised.path) as source:
        found = {int(moments.param[0]) * 2 + moments.param.endswith("bias"): moments for moments in source.quantised}
        assert 0 in found
        for i, moments in found.items():
            pieces = list(zip(*step_size.quantised_moments(source, moments), strict=True))
            for of, key in zip(pieces, ("exp_avg", "exp_avg_sq"), strict=True):
                assert len(of) == math.ceil(quantised.states[i][key].numel() / 2048)
                assert torch.equal(torch.cat(of), quantised.states[i][key].reshape(-1))


def test_weights_beside_them_are_off_by_two_hundredths_of_their_step(quantised: Quantised, tmp_path: Path) -> None:
    """The next update is worked out in float64 from what the package itself decodes."""
    made = statecodec.compress(quantised.path, tmp_path / "packed.sc.safetensors", preset="resume")
    statecodec.restore(made.path, tmp_path / "back.pt")
    with statecodec.open(quantised.path) as before, statecodec.open(tmp_path / "back.pt") as after:
        for i in (0, 2):
            name = f"model.{i // 2}.weight"
            m, v = (quantised.states[i][key].double() for key in ("exp_avg", "exp_avg_sq"))
            u = (m / (1 - 0.9**2)) / ((v / (1 - 0.999**2)).sqrt() + 1e-8)
            one_step = 1e-3 * u[v > 0].square().mean().sqrt()
            error = (before.read(name).double() - after.read(name).double()).square().mean().sqrt()
            assert 0.01 * one_step < error <= 0.0201 * one_step
    errors = [t.error["step_error"] for t in made.tensors if t.role == "weight" and t.error]
    assert len(errors) == 2
    assert max(errors) <= 0.0201
    compared = statecodec.diff(quantised.path, made.path)
    assert [t.step_error for t in compared.tensors if t.role == "weight" and t.step_error] == pytest.approx(errors)
    assert 0.01 < compared.total["weight_step_error"] <= 0.0201
    total = statecodec.verify(made.path, quantised.path).total
    assert total is not None
    assert total["weight_step_error"] == compared.total["weight_step_error"]


def test_they_become_dense_states_of_torch(quantised: Quantised, tmp_path: Path) -> None:
    dst = tmp_path / "dense.pt"
    statecodec.convert(quantised.path, dst, "torch")
    found = torch.load(dst)["optimizer"]
    for i, states in quantised.states.items():
        assert all(torch.equal(found["state"][i][key], value) for key, value in states.items())
        assert found["state"][i]["step"] == 2
    net = model()
    optimizer = torch.optim.AdamW(net.named_parameters())
    optimizer.load_state_dict(found)
    net(torch.randn(8, 64)).sum().backward()
    optimizer.step()


def test_they_become_states_of_a_live_optimizer(quantised: Quantised, tmp_path: Path) -> None:
    dst = tmp_path / "live.pt"
    statecodec.convert(quantised.path, dst, "adamw")
    optimizer = statecodec.optim.AdamW(model().named_parameters())
    optimizer.load_state_dict(torch.load(dst)["optimizer"])
    dense = optimizer.state_dict(dense=True)["state"]
    for i, states in quantised.states.items():
        for key, value in states.items():
            assert (dense[i][key] - value).norm() <= 0.05 * value.norm()


def test_states_of_32_bits_are_ordinary_moments(tmp_path: Path) -> None:
    saved = write_bitsandbytes(tmp_path, "AdamW")
    report = statecodec.inspect(saved.path)
    assert {t.role for t in report.tensors if ".state" in t.name} == {"exp_avg", "exp_avg_sq"}
    assert {u.param for u in statecodec.verify(statecodec.compress(saved.path).path, against=saved.path).updates} == {
        name for name, _ in model().named_parameters()
    }


def test_the_longer_blocks_of_older_versions() -> None:
    """bitsandbytes before 0.45 scaled 2048 numbers together; worked out by hand."""
    codes = torch.arange(5000).remainder(256).to(torch.uint8)
    state = {f"state{i}": codes for i in (1, 2)} | {f"qmap{i}": torch.linspace(-1, 1, 256) for i in (1, 2)}
    found = dense(state | {f"absmax{i}": torch.tensor([1.0, 2.0, 4.0]) for i in (1, 2)})
    table = torch.linspace(-1, 1, 256)
    assert [found["exp_avg"][i] for i in (0, 2047, 2048, 4999)] == [
        table[0], table[255], 2 * table[0], 4 * table[4999 % 256],
    ]  # fmt: skip


@pytest.mark.parametrize(("kind", "role"), [("Lion8bit", "exp_avg"), ("SGD8bit", "momentum"), ("RMSprop8bit", "other")])
def test_a_single_state_is_what_its_settings_tell(kind: str, role: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"momentum": 0.9} if kind == "SGD8bit" else {}
    from tests.frameworks.quantised import bitsandbytes, stepped

    net = model()
    path = tmp_path / "single.pt"
    torch.save(stepped(net, getattr(bitsandbytes.optim, kind)(net.parameters(), lr=1e-3, **options)), path)
    assert {t.state.role for t in statecodec.inspect(path).tensors if t.state is not None} == {role}
    for to in ("torch", "adamw"):
        with pytest.raises(UsageError, match="one moment"):
            statecodec.convert(path, tmp_path / "x.pt", to)
    assert not (tmp_path / "x.pt").exists()


def test_low_bits_of_weights_are_said_to_be_left_out(tmp_path: Path) -> None:
    path = damage(
        write_flashoptim(tmp_path, torch.float16), lambda s: s.update(error_bits=torch.ones(128, 64, dtype=torch.int8))
    )
    assert any("error_bits" in note for note in statecodec.convert(path, tmp_path / "x.pt", "torch").notes)
    assert "error_bits" not in torch.load(tmp_path / "x.pt")["optimizer"]["state"][0]


def damage(saved: Quantised, change: Any) -> Path:
    content = torch.load(saved.path)
    change(content["optimizer"]["state"][0])
    torch.save(content, saved.path)
    return saved.path


def weights_are(path: Path, expected: list[str]) -> None:
    """How `compress`, which keeps any states, stores the weights: exactly, where their step is not known."""
    tensors = statecodec.compress(path).tensors
    assert [t.codec.partition("(")[0] for t in tensors if t.role == "weight" and len(t.shape) > 1] == expected


@pytest.mark.parametrize(
    "change",
    [lambda s: s.update(absmax1=torch.ones(7)), lambda s: s.pop("qmap2"), lambda s: s.update(qmap1=torch.ones(3)),
     lambda s: s.update(state1="x"), lambda s: s.update(qmap1=torch.ones(16, 16)), lambda s: s.update(absmax1=None)],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused(change: Any, tmp_path: Path) -> None:
    path = damage(write_bitsandbytes(tmp_path, "old AdamW8bit"), change)
    weights_are(path, ["raw", "uniform"])
    with pytest.raises(MalformedCheckpoint):
        statecodec.convert(path, tmp_path / "x.pt", "torch")
    assert not (tmp_path / "x.pt").exists()


@pytest.mark.parametrize(
    "change",
    [lambda s: s.pop("exp_avg::scales"), lambda s: s.update({"exp_avg::scales": torch.ones(1)}),
     lambda s: s.update({"exp_avg::quantized": torch.ones(128, 64)}),
     lambda s: s.update({"exp_avg::quantized": torch.zeros(1, dtype=torch.int8).expand(2**45),
                         "exp_avg::scales": torch.zeros(1, dtype=torch.float16).expand(2**40)}),
     lambda s: [s.pop("exp_avg_sq::quantized"), s.pop("exp_avg_sq::scales")]],
)  # fmt: skip
def test_the_same_of_flashoptim(change: Any, tmp_path: Path) -> None:
    path = damage(write_flashoptim(tmp_path, torch.float16), change)
    weights_are(path, ["raw", "uniform"])
    with pytest.raises(StatecodecError):
        statecodec.convert(path, tmp_path / "x.pt", "torch")
    assert not (tmp_path / "x.pt").exists()
