"""The verbs on real files: what they write, print and refuse."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
import torch

from tests.cli.run import Cli, checkpoint, finished


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_lossless_there_and_back(cli: Cli, ckpt: Path) -> None:
    before = sha256(ckpt)
    assert cli("compress", ckpt, "--preset", "lossless", "--verify").code == 0
    assert names(ckpt.parent) == ["ckpt.pt", "ckpt.sc.safetensors"]
    packed = ckpt.with_name("ckpt.sc.safetensors")
    assert packed.stat().st_size < ckpt.stat().st_size
    ckpt.unlink()
    assert cli("restore", packed).code == 0
    assert sha256(ckpt) == before


def test_compress_reports_what_it_did(cli: Cli, ckpt: Path) -> None:
    document = cli("compress", ckpt, "--json").json()
    packed = ckpt.with_name("ckpt.sc.safetensors")
    assert document["bytes"] == packed.stat().st_size
    assert document["source"]["bytes"] == ckpt.stat().st_size
    assert document["source"]["layout"] == "torch_zip"
    assert document["ratio"] > 2
    assert document["num_params"] == 2 * (96 * 96 + 96)
    codecs = {t["role"]: t["codec"] for t in document["tensors"] if t["shape"] == [96, 96]}
    assert codecs["weight"].startswith("uniform")
    assert codecs["exp_avg"].startswith("direction")
    assert document["total"]["u_rms"] <= 0.01


@pytest.mark.parametrize(("words", "value"), [("0.023", 0.023), ("2.3%", 0.023), (" 2.3 %", 0.023), ("1e-1%", 0.001)])
def test_a_fraction_may_be_a_percentage(cli: Cli, ckpt: Path, words: str, value: float) -> None:
    options = ("--max-update-error", words, "--max-weight-error", words)
    assert cli("compress", ckpt, *options, "--json").json()["asked"] == {"u_rms": value, "weight_step_error": value}
    assert cli("compress", ckpt, "-f", "--max-step-error", words, "--json").json()["asked"]["u_rms"] == value


@pytest.mark.parametrize("option", ["--max-step-error", "--max-update-error", "--max-weight-error"])
@pytest.mark.parametrize(
    "value", ["0", "-1%", "3", "101%", "nan", "inf%", "1 pct", "%", "", "0,01", "1%%", "1e99999999"]
)
def test_a_wrong_fraction_is_refused_by_the_name_of_its_option(cli: Cli, ckpt: Path, option: str, value: str) -> None:
    done = cli("compress", ckpt, f"{option}={value}")
    assert done.code == 2
    assert f"'{option}': {value!r} is not a fraction of an optimizer step" in done.err
    assert "such as 0.01 or 1%" in done.err
    remote = cli("remote", "compress", ckpt, "--server", "http://127.0.0.1:9", f"{option}={value}")
    assert (remote.code, remote.err) == (2, done.err)


def test_what_the_library_says_of_a_keyword_names_the_option(cli: Cli, tmp_path: Path) -> None:
    torch.save({"codes": torch.arange(8192)}, tmp_path / "max_step_error: x.pt")
    done = cli("compress", tmp_path / "max_step_error: x.pt", "--max-weight-error", "1%")
    assert done.code == 2
    assert "error: --max-weight-error: no weights are known in " in done.err
    assert "max_step_error: x.pt" in done.err, "a path stays as it is"


def test_the_table_goes_to_stdout_and_nothing_else_does(ckpt: Path) -> None:
    for words in ((), ("--quiet",)):
        done = finished("compress", ckpt, "--force", *words)
        assert done.code == 0
        assert "exp_avg_sq" in done.out
        assert "B/param" in done.out
        assert "compiling" not in done.out
        assert "exp_avg_sq" not in done.err  # on a slow machine progress is there, and nothing else
        assert not words or not done.err


@pytest.mark.parametrize("width", [60, 80, 200])
def test_everything_fits_the_terminal(cli: Cli, ckpt: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.chdir(ckpt.parent)
    packed = "ckpt.sc.safetensors"
    calls = (
        ("compress", ckpt.name, "--rule", "*.misspelt=raw"), ("compress", ckpt.name),
        ("inspect", packed), ("inspect", packed, "-a"), ("inspect", packed, "-q"),
        ("inspect", ckpt.name), ("diff", ckpt.name, packed), ("diff", ckpt.name, packed, "-a"),
        ("verify", packed, "--against", ckpt.name), ("restore", packed, "-o", "again.pt"), ("restore", ckpt.name),
        ("analyze", ckpt.name, "--snr", "--curve"), ("convert", ckpt.name, "x.sc.safetensors", "--to", "exp_avg=raw"),
        ("codecs",), ("compress", "--help"), ("--help",), (), ("compress",), ("compress", "missing.pt"),
    )  # fmt: skip
    for words in calls:
        done = cli(*words)
        lines = (done.out + done.err).splitlines()
        # What must not be cut may run over: a digest of 64 digits, a rule.
        wide = [line for line in lines if len(line) > width and "SHA-256" not in line and ">=4096=" not in line]
        assert not wide, words
        assert not [line for line in lines if line != line.rstrip()], words
    assert re.search(r"^role +codec ", cli("inspect", packed).out, re.MULTILINE)


def test_rules_go_before_the_preset(cli: Cli, ckpt: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.json"
    rules.write_text('["exp_avg=cast(to=bf16)"]')
    words = ("compress", ckpt, "--rule", "weight=raw", "--rules", rules, "--json")
    codecs = {t["role"]: t["codec"] for t in cli(*words).json()["tensors"] if t["shape"] == [96, 96]}
    assert codecs["weight"] == "raw"
    assert codecs["exp_avg"].startswith("cast")
    assert codecs["exp_avg_sq"].startswith("logarithmic")


@pytest.mark.parametrize("rule", ["weight=quantum", "weight=companded(bits=7)", "no equals sign", "weight:fp7=raw"])
def test_a_bad_rule_is_refused_by_name(cli: Cli, ckpt: Path, rule: str) -> None:
    done = cli("compress", ckpt, "--rule", rule, "--json")
    assert done.code == 1
    assert done.json()["error"]["code"] == "policy"
    assert rule in done.json()["error"]["message"]
    assert names(ckpt.parent) == ["ckpt.pt"]


@pytest.mark.parametrize("words", [("--pack", "lzma"), ("--max-shard-size", "many")])
def test_a_bad_setting_is_refused(cli: Cli, ckpt: Path, words: tuple[str, ...]) -> None:
    done = cli("compress", ckpt, *words, "--json")
    assert done.code == 2
    assert done.json()["error"]["code"] == "usage"
    assert names(ckpt.parent) == ["ckpt.pt"]


def test_an_existing_output_needs_force(cli: Cli, ckpt: Path) -> None:
    packed = ckpt.with_name("ckpt.sc.safetensors")
    packed.write_text("precious")
    done = cli("compress", ckpt, "--json")
    assert done.code == 1
    assert done.json()["error"]["code"] == "output.exists"
    assert packed.read_text() == "precious"
    assert cli("compress", ckpt, "--force").code == 0
    before = sha256(ckpt)
    assert cli("restore", packed, "--json").json()["error"]["code"] == "output.exists"
    assert sha256(ckpt) == before
    assert cli("restore", packed, "--force").code == 0


def test_an_output_folder(cli: Cli, ckpt: Path, tmp_path: Path) -> None:
    refused = cli("compress", ckpt, "-o", f"{tmp_path}/new/", "--json")
    assert (refused.code, refused.json()["error"]["code"]) == (2, "usage")
    (tmp_path / "new").mkdir()
    assert cli("compress", ckpt, "-o", f"{tmp_path}/new/").code == 0
    assert names(tmp_path / "new") == ["ckpt.sc.safetensors"]
    assert cli("convert", ckpt, f"{tmp_path}/new/", "--to", "torch").code == 2


def test_strict_rules(cli: Cli, ckpt: Path) -> None:
    done = cli("compress", ckpt, "--rule", "*.wieght=raw")
    assert done.code == 0
    assert "1 rule matches no tensor: *.wieght=raw" in done.out
    refused = cli("compress", ckpt, "--force", "--strict", "--rule", "*.wieght=raw", "--json")
    assert (refused.code, refused.json()["error"]["code"]) == (1, "policy")


def test_what_is_no_checkpoint_is_refused(cli: Cli, tmp_path: Path) -> None:
    stranger = tmp_path / "notes.txt"
    stranger.write_text("hello")
    for verb in ("compress", "inspect"):
        done = cli(verb, stranger, "--json")
        assert done.code == 1
        assert done.json()["error"]["code"].startswith("layout")
    for verb in ("restore", "verify"):
        done = cli(verb, stranger, "--json")
        assert done.code == 1
        assert done.json()["error"]["code"].startswith(("format", "layout"))
    assert names(tmp_path) == ["notes.txt"]


def test_what_is_in_several_files_goes_by_the_name_that_was_given(cli: Cli, ckpt: Path) -> None:
    packed = ckpt.with_name("cut.sc.safetensors")
    assert cli("compress", ckpt, "-o", packed, "--preset", "lossless", "--max-shard-size", "20kB").code == 0
    assert not packed.exists()
    restored = packed.parent / "b"
    for words in (("inspect", packed), ("verify", packed, "--against", ckpt), ("restore", packed, "-o", restored)):
        done = cli(*words)
        assert done.code == 0, done.err
    assert restored.read_bytes() == ckpt.read_bytes()


def test_inspect_of_both_kinds(cli: Cli, ckpt: Path) -> None:
    plain = cli("inspect", ckpt, "--json").json()
    assert plain["format_version"] is None
    assert plain["num_params"] == 2 * (96 * 96 + 96)
    cli("compress", ckpt, "--sha256")
    packed = cli("inspect", ckpt.with_name("ckpt.sc.safetensors"), "--json").json()
    assert packed["format_version"] == [2, 2]
    assert packed["preset"] == "resume"
    assert packed["source"]["sha256"] == sha256(ckpt)
    assert sorted(t["name"] for t in packed["tensors"]) == sorted(t["name"] for t in plain["tensors"])
    assert "exp_avg" in cli("inspect", ckpt).out
    assert "optimizer.state.0.exp_avg" in cli("inspect", ckpt, "--all").out


def test_verify_finds_a_flipped_bit(cli: Cli, ckpt: Path) -> None:
    cli("compress", ckpt)
    packed = ckpt.with_name("ckpt.sc.safetensors")
    assert cli("verify", packed).code == 0
    assert cli("verify", packed, "--against", ckpt).code == 0
    content = bytearray(packed.read_bytes())
    content[len(content) // 2] ^= 4
    packed.write_bytes(content)
    done = cli("verify", packed, "--json")
    assert done.code == 1
    assert done.json()["error"]["code"].startswith("format")
    assert cli("restore", packed, "-o", ckpt.with_name("again.pt")).code == 1
    assert names(ckpt.parent) == ["ckpt.pt", "ckpt.sc.safetensors"]


def test_verify_against_another_checkpoint_fails(cli: Cli, ckpt: Path) -> None:
    cli("compress", ckpt)
    other = checkpoint(ckpt.with_name("other.pt"), steps=5)
    done = cli("verify", ckpt.with_name("ckpt.sc.safetensors"), "--against", other, "--json")
    assert done.code == 1
    assert done.json()["error"]["code"] == "verify.failed"


def test_diff_measures_the_update(cli: Cli, ckpt: Path) -> None:
    cli("compress", ckpt)
    packed = ckpt.with_name("ckpt.sc.safetensors")
    document = cli("diff", ckpt, packed, "--json").json()
    assert 0 < document["total"]["u_rms"] < 0.02
    assert document["total"]["max_u"] <= 1.3 * document["total"]["max_u_exact"]
    assert {t["role"] for t in document["tensors"]} >= {"weight", "exp_avg", "exp_avg_sq"}
    assert "Adam update" in cli("diff", ckpt, packed).out
    same = cli("diff", ckpt, ckpt)
    assert same.code == 0
    assert "identical" in same.out


def test_what_is_restored_loads_in_torch(cli: Cli, ckpt: Path) -> None:
    cli("compress", ckpt, "--preset", "tiny")
    again = ckpt.with_name("again.pt")
    assert cli("restore", ckpt.with_name("ckpt.sc.safetensors"), "-o", again).code == 0
    exact, lossy = (torch.load(path, weights_only=True) for path in (ckpt, again))
    assert exact["optimizer"]["param_groups"] == lossy["optimizer"]["param_groups"]
    for name, weight in exact["model"].items():  # no weight is off by more than a step of lr = 1e-3
        torch.testing.assert_close(lossy["model"][name], weight, rtol=0, atol=1e-3)


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_plots(cli: Cli, ckpt: Path, tmp_path: Path, suffix: str) -> None:
    packed = ckpt.with_name("ckpt.sc.safetensors")
    for verb, *words in (("compress", ckpt, "--force"), ("inspect", packed), ("inspect", ckpt), ("diff", ckpt, packed)):
        target = tmp_path / f"{verb}.{suffix}"
        assert cli(verb, *words, "--plot", target).code == 0
        assert target.stat().st_size > 3000


def test_files_that_are_not_understood_are_no_tensors(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    torch.save({"w": torch.ones(9, 9)}, folder / "m.pt")
    (folder / "config.json").write_text("{}")
    (folder / "notes.txt").write_text("none")
    out = cli("inspect", folder).out
    assert "1 tensors" in out
    rest = [line for line in out.splitlines() if line.startswith(("not tensors", "other files"))]
    assert [line.split()[3] for line in rest] == ["-", "-"]
