from __future__ import annotations

import json
import math

import pytest

from statecodec_cli import console


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (12_345, "12.3 kB"), (999_400, "999 kB"), (999_600, "1.00 MB"),
        (147_900_000, "148 MB"), (4_560_000_000, "4.56 GB"), (10**15, "1.00 PB"), (5 * 10**18, "5000 PB"),
    ],
)  # fmt: skip
def test_size_has_three_significant_figures(nbytes: int, text: str) -> None:
    assert console.size(nbytes) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.42, "0.42 s"), (3.21, "3.2 s"), (59.4, "59 s"), (60, "1 min 00 s"), (3723, "1 h 02 min")]
)
def test_seconds(value: float, text: str) -> None:
    assert console.seconds(value) == text


def test_error_tells_exact_from_small() -> None:
    assert console.error(0.0) == "exact"
    assert console.error(1e-12) == "1.0e-12"
    assert console.error(0.009981) == "0.00998"  # just under a budget of 0.01, and seen to be
    assert console.error(0.24) == "0.240"
    assert console.error(123.4) == "123"
    assert console.error(None) == ""
    assert console.error("nan") == "nan"


def test_ratio_of_nothing_is_no_number() -> None:
    assert console.ratio(12, 4) == "3.00x"
    assert console.ratio(12, 0) == "-"


def test_json_has_no_bare_nan(capsys: pytest.CaptureFixture[str]) -> None:
    console.emit({"a": math.nan, "b": [math.inf, -math.inf], "c": 1.5})
    text = capsys.readouterr().out
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"bare {name}"))
    assert strict == {"a": "NaN", "b": ["Infinity", "-Infinity"], "c": 1.5}


def test_error_message_is_not_read_as_markup(capsys: pytest.CaptureFixture[str]) -> None:
    console.fail("format.corrupt", "file [red]a[/nope] is damaged", as_json=False)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: file [red]a[/nope] is damaged  [format.corrupt]\n"


def test_messages_are_wrapped_between_words_and_words_stay_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    path = "/a/very/long/path" * 5
    console.fail("io", f"{path}: cannot be read because of something; two  spaces\nare kept", as_json=False)
    assert capsys.readouterr().err.splitlines() == [
        "error:", f"  {path}:", "  cannot be read because of something; two  spaces", "are kept  [io]",
    ]  # fmt: skip
