from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from statecodec.errors import UsageError
from statecodec_cli import plots
from tests.cli import documents


def test_svg_names_sizes_roles_and_codecs(tmp_path: Path) -> None:
    target = tmp_path / "sizes.svg"
    plots.save(plots.report(documents.report()), target)
    words = " ".join(ElementTree.parse(target).getroot().itertext())
    for word in ("exp_avg_sq", "companded(curve=log)", "3.00x", "ckpt.pt", "Relative rms error"):
        assert word in words
    assert [p.name for p in tmp_path.iterdir()] == ["sizes.svg"]


def test_svg_is_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        plots.save(plots.report(documents.report()), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize("make", [documents.report, documents.plain])
def test_png(tmp_path: Path, make: object) -> None:
    target = tmp_path / "sizes.png"
    plots.save(plots.report(make()), target)  # type: ignore[operator]
    assert target.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_errors_in_optimizer_steps_have_a_panel_of_their_own(tmp_path: Path) -> None:
    target = tmp_path / "diff.svg"
    document = documents.difference()
    document["tensors"][0]["step_error"], document["tensors"][3]["step_error"] = 0.02, 0.0091
    plots.save(plots.difference(document), target)
    words = " ".join(ElementTree.parse(target).getroot().itertext())
    assert "step error: update 0.91 %" in words
    assert "Error in optimizer steps" in words
    assert {"1 %", "2 %"} <= set(re.findall(r"\d+ %", words.split("Relative rms error")[1]))
    document = documents.report()
    document["tensors"][3]["error"] = {"step_error": 0.0091}
    plots.save(plots.report(document), target)
    words = " ".join(ElementTree.parse(target).getroot().itertext())
    assert words.index("Relative rms error") < words.index("Error in optimizer steps"), "below it"


def test_difference_of_equals_says_so(tmp_path: Path) -> None:
    document = documents.difference() | {"updates": [], "total": {}}
    for tensor in document["tensors"]:
        tensor["relative_rms"] = 0.0
    plots.save(plots.difference(document), tmp_path / "diff.svg")
    assert "no difference" in (tmp_path / "diff.svg").read_text()


@pytest.mark.parametrize("name", ["sizes.pdf", "sizes", "nowhere/sizes.svg"])
def test_a_bad_target_is_refused_before_any_work(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="--plot"):
        plots.require(tmp_path / name)


def test_without_matplotlib_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'statecodec\[plot\]'"):
        plots.require(tmp_path / "sizes.svg")


def test_a_failed_save_leaves_the_old_figure_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "sizes.svg"
    target.write_text("old")
    figure = plots.report(documents.report())

    def broken(path: Path, **_: object) -> None:
        Path(path).write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", broken)
    with pytest.raises(OSError, match="disk full"):
        plots.save(figure, target)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("sizes.svg", "old")]


def test_pyplot_and_global_state_are_left_alone(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib, matplotlib\n"
        "def settings(): return {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != 'backend'}\n"
        "before = settings()\n"
        "from statecodec_cli import plots; from tests.cli import documents\n"
        f"plots.save(plots.report(documents.report()), pathlib.Path({str(tmp_path / 'x.svg')!r}))\n"
        "assert 'matplotlib.pyplot' not in sys.modules; assert settings() == before\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
