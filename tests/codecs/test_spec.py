"""Codecs as text and as JSON: everything that is not one is refused by name."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statecodec import codecs
from statecodec.errors import CodecError, InvalidCodec, StatecodecError, UnknownCodec, UnsupportedVersion
from statecodec.kernels.grids import MAX_STEP, MIN_STEP


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", InvalidCodec),
        ("zip", UnknownCodec),
        ("companded(", InvalidCodec),
        ("companded(bits=5)", InvalidCodec),
        ("companded(bits=8.5)", InvalidCodec),
        ("companded(bits=eight)", InvalidCodec),
        ("companded(level=2)", InvalidCodec),
        ("companded(curve=log,per_octave=1)", InvalidCodec),
        ("companded(steps=4)", InvalidCodec),
        ("companded(group=3)", InvalidCodec),
        ("raw raw", InvalidCodec),
        ("folded(inner=zip)", InvalidCodec),
        ("folded(inner=zip())", UnknownCodec),
        ("shared(dims=[1,0])", InvalidCodec),
        ("shared(dims=[])", InvalidCodec),
        ("lowrank(rank=0)", InvalidCodec),
        ("lowrank(rank=2,form=rank_one)", InvalidCodec),
        ("split(low_bits=12)", InvalidCodec),
        ("cast(to=int8)", InvalidCodec),
        ("folded(inner=folded(inner=folded(inner=folded(inner=folded(inner=raw)))))", InvalidCodec),
        ("companded(group=99999999999999999999)", InvalidCodec),
        ("companded(group=32.0)", InvalidCodec),
        ("uniform(step=0)", InvalidCodec),
        ("uniform(step=-1.0)", InvalidCodec),
        ("uniform(step=nan)", InvalidCodec),
        ("uniform(step=inf)", InvalidCodec),
        ("uniform(step=1e999)", InvalidCodec),
        ("uniform(step=1e-300)", InvalidCodec),
        ("uniform(step=1.)", InvalidCodec),
        ("uniform(step=99999999999999999999)", InvalidCodec),
        (f"uniform(step=1.{'0' * 100})", InvalidCodec),
        ("direction(eps=0)", InvalidCodec),
        ("logarithmic(per_octave=0)", InvalidCodec),
        ("logarithmic(per_octave=65)", InvalidCodec),
        ("logarithmic(per_octave=2.5)", InvalidCodec),
    ],
)
def test_refused(text: str, error: type[CodecError]) -> None:
    with pytest.raises(error):
        codecs.parse(text)


@pytest.mark.parametrize(
    "config",
    [
        None,
        3,
        [],
        {},
        {"name": 3},
        {"name": "companded", "bits": "8"},
        {"name": "companded", "bits": True},
        {"name": "companded", "extra": 1},
        {"name": "shared", "dims": [0, "1"]},
        {"name": "folded", "inner": "raw"},
        {"name": "raw", "version": 2},
        {"name": "uniform", "step": "1"},
        {"name": "uniform", "step": True},
        {"name": "uniform", "step": None},
        {"name": "uniform", "step": 10**400},
        {"name": "uniform", "step": float("nan")},
        {"name": "uniform", "step": float("inf")},
        {"name": "logarithmic", "steps": 8.0},
    ],
)
def test_untrusted_config(config: object) -> None:
    with pytest.raises((CodecError, UnsupportedVersion)):
        codecs.from_config(config)  # type: ignore[arg-type]


@given(st.floats(MIN_STEP, MAX_STEP), st.floats(MIN_STEP, 1.0))
def test_floats_are_kept_to_the_bit(step: float, eps: float) -> None:
    for codec in (codecs.Uniform(step), codecs.Direction(step, eps)):
        assert codecs.parse(codecs.format_codec(codec)) == codec
        assert codecs.from_config(json.loads(json.dumps(codec.config()))) == codec


def test_a_whole_number_is_a_float_too() -> None:
    for codec in (codecs.parse("uniform(step=2)"), codecs.from_config({"name": "uniform", "step": 2})):
        assert codec == codecs.Uniform(2.0)
        assert type(codec.step) is float


@given(
    st.text(max_size=60)
    | st.text(alphabet="companded(bits=48,)[]0l ", max_size=60)
    | st.text(alphabet="uniform(step=1.0e-9)", max_size=30).map(lambda t: f"uniform(step={t})")
)
def test_any_text_is_a_codec_or_our_error(text: str) -> None:
    try:
        codec = codecs.parse(text)
    except StatecodecError:
        return
    assert codecs.parse(codecs.format_codec(codec)) == codec


def test_docs_name_every_codec() -> None:
    named = [
        "raw",
        "uniform",
        "direction",
        "logarithmic",
        "split",
        "cast",
        "companded",
        "folded",
        "shared",
        "lowrank",
        "dropped",
        "ulps",
        "same",
        "following",
    ]
    assert sorted(codecs.names()) == sorted(named)
