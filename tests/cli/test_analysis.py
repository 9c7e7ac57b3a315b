"""analyze, convert, budgets and chains from the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.cli.run import Cli

TABLE = Path(__file__).parents[1] / "choose" / "data" / "slimadam_gpt2_lr0.0003.csv"


def test_two_commands_to_a_picture_rules_and_a_smaller_file(cli: Cli, ckpt: Path, tmp_path: Path) -> None:
    rules, picture = tmp_path / "rules.json", tmp_path / "a.svg"
    done = cli("analyze", ckpt, "--snr", "--curve", "-o", rules, "--plot", picture, "-q")
    assert done.code == 0
    assert "SNR over 0,1" in done.out
    assert "resume" in done.out
    assert str(rules) in done.err
    assert "<svg" in picture.read_text()[:1000]
    assert {tuple(e) for e in json.loads(rules.read_text())["rules"]} <= {("pattern", "role", "dims", "codec", "snr")}

    # Rules of one's own go first; the budget is for the others.
    assert cli("compress", ckpt, "--max-update-error", "0.9", "--rules", rules, "-o", tmp_path / "r", "-q").code == 0

    made = cli("compress", ckpt, "--max-update-error", "0.02", "--max-weight-error", "0.001", "--json", "-q")
    document = made.json()
    assert document["total"]["u_rms"] <= 0.02
    assert document["total"]["weight_step_error"] < 0.1  # this early, a thousandth of a step is finer than 24 bits


@pytest.mark.parametrize("words", [(), ("-a",), ("--by", "layer"), ("--cutoff", "0.5"), ("--curve",)])
def test_analyze_tables(cli: Cli, ckpt: Path, words: tuple[str, ...]) -> None:
    done = cli("analyze", ckpt, *words, "-q")
    assert done.code == 0, done.err
    if "--curve" in words:
        assert "SNR" not in done.out, "a curve alone measures no SNR"
        assert re.search(r"\n +1 % +[\d.]+ % +\d\.\d+ +resume\n", done.out)
    else:
        assert "rules at SNR >" in done.out
        assert re.search(r"saved +update, of a step\n.*by layer +\d.* % +(exact|[\d.]+ %)\n", done.out)


def test_analyze_json_and_csv(cli: Cli, tmp_path: Path) -> None:
    document = cli("analyze", TABLE, "--json", "--plot", tmp_path / "b.png").json()
    assert document["saved"]["layer"] == pytest.approx(0.994, abs=5e-4)
    assert len(document["tensors"]) == 99
    assert (tmp_path / "b.png").read_bytes()[:4] == b"\x89PNG"


def test_what_analyze_refuses(cli: Cli, ckpt: Path, tmp_path: Path) -> None:
    assert cli("analyze", ckpt, "--plot", tmp_path / "a.pdf").code == 2
    assert cli("analyze", TABLE, ckpt).code == 2
    assert cli("analyze", tmp_path / "none.pt").code == 2


def test_convert_and_back(cli: Cli, ckpt: Path, tmp_path: Path) -> None:
    done = cli("convert", ckpt, tmp_path / "b.sc.safetensors", "--to", "exp_avg_sq:ndim>=2=shared(dims=[1])", "-q")
    assert done.code == 0, done.err
    assert "shared" in done.out
    assert "step error: update " in done.out
    done = cli("convert", ckpt, tmp_path / "foam.pt", "--to", "foam(level=1)", "-q")
    assert done.code == 0, done.err
    assert re.search(r"\nstep error: update \d[\d.]* % at worst\n", done.out)
    back = cli("convert", tmp_path / "foam.pt", tmp_path / "back.pt", "--to", "torch", "--json", "-q")
    assert back.json()["bytes"] > 0
    done = cli("convert", ckpt, tmp_path / "folder", "--layout", "dcp", "-q")
    assert done.code == 0, done.err
    assert (tmp_path / "folder" / ".metadata").is_file()
    assert cli("convert", ckpt, "-", "--layout", "dcp", "-q").code == 2
    assert cli("convert", ckpt, tmp_path / "c.pt", "--to", "foam(", "-q").code == 2  # a rule that cannot be read
    assert not (tmp_path / "c.pt").exists()


def test_chain(cli: Cli, ckpt: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.sc.safetensors", tmp_path / "second.sc.safetensors"
    assert cli("compress", ckpt, "-o", first, "-q").code == 0
    made = cli("compress", ckpt, "-o", second, "--base", first, "--json", "-q").json()
    assert any(t["codec"].startswith("delta") for t in made["tensors"])
    assert made["bytes"] < first.stat().st_size / 2
    assert cli("diff", first, second, "--json").json()["identical"]
    first.unlink()
    done = cli("restore", second, "-o", tmp_path / "out.pt")
    assert done.code == 1
    assert "first.sc.safetensors" in done.err
