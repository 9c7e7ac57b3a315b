"""How a stored item holds its tensor: text, JSON, parts; and where a change may not stand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statecodec import codecs
from statecodec.choose import parse_rule
from statecodec.codecs import Change, Codec, Encoding
from statecodec.dtypes import FLOAT16, FLOAT32, INT64
from statecodec.errors import (
    CodecError,
    InvalidCodec,
    PolicyError,
    StatecodecError,
    UnknownCodec,
    UnsupportedTensor,
    UnsupportedVersion,
)

OF_PARTS = ["raw", "cast", "split(low_bits=16)", "companded(bits=4)", "logarithmic", "uniform(step=0.001)"]
OF_VALUES = ["cast(to=fp16)", "companded", "companded(curve=linear)", "uniform"]
ALL = [
    *(Encoding(codecs.parse(text)) for text in ("raw", "dropped", "shared(dims=[0])", *OF_PARTS)),
    *(Encoding(codecs.parse(text), Change.PARTS) for text in OF_PARTS),
    *(Encoding(codecs.parse(text), Change.VALUES) for text in OF_VALUES),
]


@pytest.mark.parametrize("encoding", ALL, ids=str)
def test_it_is_its_text_and_its_config(encoding: Encoding) -> None:
    assert Encoding.parse(str(encoding)) == encoding
    assert Encoding.from_config(encoding.config()) == encoding
    assert encoding.nbytes((40, 30), FLOAT32) == sum(s.nbytes for s in encoding.parts((40, 30), FLOAT32).values())


def test_the_json_is_that_of_earlier_files() -> None:
    raw = {"name": "raw", "version": 1}
    assert Encoding(codecs.Raw()).config() == raw
    for change in Change:
        codec = codecs.Cast()
        expected = {"name": change.value, "version": 1, "inner": codec.config()}
        assert list(Encoding(codec, change).config().items()) == list(expected.items())  # in this order
    assert Encoding.from_config({"name": "delta"}) == Encoding(codecs.Raw(), Change.PARTS)
    assert Encoding.from_config({"name": "residual", "version": 1}) == Encoding(codecs.Companded(), Change.VALUES)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("delta", "delta(inner=raw)"), ("delta()", "delta"), (" delta ( inner = split , ) ", "delta(inner=split)"),
        ("residual", "residual(inner=companded)"), ("residual(inner=cast())", "residual(inner=cast)"),
    ],
)  # fmt: skip
def test_texts_that_mean_the_same(text: str, same: str) -> None:
    assert Encoding.parse(text) == Encoding.parse(same)


@pytest.mark.parametrize(
    "text",
    [
        "delta(inner=shared)", "delta(inner=delta)", "residual(inner=raw)", "residual(inner=delta)",
        "delta(inner=residual)", "residual(inner=companded(curve=log))", "delta(inner=direction)", "delta(level=2)",
        "delta(raw)", "delta(inner=raw", "delta(inner=raw))", "delta raw", "delta(inner=raw,inner=raw)",
        "delta(inner=)", "folded(inner=delta)", "folded(inner=residual)", "shared(dims=[0],inner=delta)", "Delta",
    ],
)  # fmt: skip
def test_what_no_change_is(text: str) -> None:
    with pytest.raises(CodecError):
        Encoding.parse(text)
    with pytest.raises(PolicyError):
        parse_rule(f"weight={text}")


@pytest.mark.parametrize("name", ["delta", "residual"])
@pytest.mark.parametrize("text", ["{}", "folded(inner={})", "shared(dims=[0],inner={}(inner=cast))"])
def test_a_change_is_no_codec_and_says_what_it_is(name: str, text: str) -> None:
    with pytest.raises(InvalidCodec, match=rf"{name} is no codec.*--base"):
        codecs.parse(text.format(name))
    inner = {"name": name, "version": 1, "inner": {"name": "raw", "version": 1}}
    for config in (inner, {"name": "folded", "version": 2, "inner": inner}):
        with pytest.raises(InvalidCodec, match=rf"{name} is no codec"):
            codecs.from_config(config)
    assert name not in codecs.names()


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"name": "delta", "version": 2}, UnsupportedVersion),
        ({"name": "delta", "version": True}, UnsupportedVersion),
        ({"name": "delta", "version": "1"}, UnsupportedVersion),
        ({"name": "delta", "level": 1}, InvalidCodec),
        ({"name": "delta", "inner": 3}, InvalidCodec),
        ({"name": "delta", "inner": None}, InvalidCodec),
        ({"name": "delta", "inner": {"name": "delta"}}, InvalidCodec),
        ({"name": "residual", "inner": {"name": "raw"}}, InvalidCodec),
        ({"name": "delta", "inner": {"name": "folded"}}, InvalidCodec),
        ({"name": "epsilon", "inner": {"name": "raw"}}, UnknownCodec),
        ({"name": ["delta"]}, InvalidCodec),
        ({}, InvalidCodec),
    ],
)
def test_hostile_configs(config: dict[str, Any], error: type[StatecodecError]) -> None:
    with pytest.raises(error):
        Encoding.from_config(config)


@given(st.text(alphabet="deltarsiun(=)[], 0.", max_size=30))
def test_any_text_is_an_encoding_or_refused(text: str) -> None:
    try:
        encoding = Encoding.parse(text)
    except StatecodecError:
        return
    assert Encoding.parse(str(encoding)) == encoding


def test_what_comes_back_bit_for_bit() -> None:
    raw, cast = codecs.Raw(), codecs.Cast()
    assert [Encoding(raw).exact, Encoding(raw, Change.PARTS).exact] == [True, True]
    lossy = [Encoding(cast), Encoding(cast, Change.PARTS), Encoding(cast, Change.VALUES)]
    assert not any(encoding.exact for encoding in lossy)
    assert [encoding.standalone for encoding in lossy] == [cast, cast, None]


@pytest.mark.parametrize("codec", [codecs.parse(text) for text in OF_PARTS], ids=str)
def test_changed_parts_are_integers_of_the_same_bytes(codec: Codec) -> None:
    shape = (12, 130)
    own, changed = codec.parts(shape, FLOAT32), Encoding(codec, Change.PARTS).parts(shape, FLOAT32)
    assert [f"delta.{name}" for name in own] == list(changed)
    assert [s.nbytes for s in own.values()] == [s.nbytes for s in changed.values()]
    assert not any(s.dtype.is_floating_point for s in changed.values())


def test_differences_of_values_are_of_floats() -> None:
    encoding = Encoding(codecs.Companded(), Change.VALUES)
    with pytest.raises(UnsupportedTensor, match="use raw"):
        encoding.parts((3,), INT64)
    half = encoding.parts((3, 200), FLOAT16)
    assert half == {f"residual.{k}": s for k, s in codecs.Companded().parts((3, 200), FLOAT32).items()}


def test_the_codec_settles_inside_a_change() -> None:
    old = codecs.parse("companded(bits=4,rows=last)")
    for change in (None, *Change):
        assert Encoding(old, change).settled((7,)) == Encoding(codecs.parse("companded(bits=4)"), change)
        assert Encoding(old, change).settled((7, 3, 3)) == Encoding(old, change)
