"""The plain-dict form: what stands in it, that it survives torch's files, and that hostile ones are refused."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from statecodec.codecs import Codec, Companded, EncodedTensor, Folded, LowRank, Raw, Shared, Split, Uniform
from statecodec.codecs.plain import from_plain, is_plain, to_plain
from statecodec.errors import FormatError, StatecodecError

CODECS: list[Codec] = [
    Raw(), Split(), Companded(bits=4), Companded("sqrt", group=32), Folded(2, Companded(group=32)), Shared((0,)),
    LowRank(3), Uniform(2.0**-10),
]  # fmt: skip
KEY = "float32[4,40] companded(version=3,curve=softsign,bits=8,group=32,per_octave=0,top=0,rows=first)"


def first_form(encoded: EncodedTensor) -> dict[str, Any]:
    """What version 0.1.0 saved."""
    dtype = str(encoded.dtype).removeprefix("torch.")
    parts = dict(encoded.parts)
    return {"codec": encoded.codec.config(), "shape": list(encoded.shape), "dtype": dtype, "parts": parts}


def taken_apart(plain: dict[str, Any]) -> dict[str, Any]:
    """What is left of it when torch has flattened it and put it together again: keys end at every dot."""
    ((key, parts),) = plain.items()
    root: dict[str, Any] = {}
    for part, value in parts.items():
        *outer, last = f"{key}.{part}".split(".")
        node = root
        for word in outer:
            node = node.setdefault(word, {})
        node[last] = value
    return root


@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.name)
def test_round_trip_through_a_file(codec: Codec) -> None:
    encoded = codec.encode(torch.rand(6, 70))
    plain = to_plain(encoded)
    (parts,) = plain.values()
    assert all(parts[k] is t for k, t in encoded.parts.items())
    file = io.BytesIO()
    torch.save({"exp_avg": plain}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["exp_avg"]
    for form in (loaded, taken_apart(loaded), first_form(encoded)):
        assert is_plain(form)
        found = from_plain(form)
        assert (found.codec, found.shape, found.dtype) == (codec, (6, 70), torch.float32)
        assert torch.equal(found.decode(), encoded.decode())


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3, 4)])
def test_every_shape(shape: tuple[int, ...]) -> None:
    assert from_plain(to_plain(Raw().encode(torch.zeros(shape)))).shape == shape


def test_the_documented_example() -> None:
    plain = to_plain(Companded(group=32).zeros((4, 40), torch.float32))
    assert list(plain) == [KEY]
    assert {k: (str(t.dtype), list(t.shape)) for k, t in plain[KEY].items()} == {
        "codes": ("torch.int8", [4, 40]), "scales": ("torch.bfloat16", [4, 2]),
    }  # fmt: skip


def good() -> dict[str, Any]:
    return to_plain(Companded(group=32).encode(torch.rand(4, 40)))


def rename(old: str, new: str) -> Any:
    return lambda p: p.update({KEY.replace(old, new): p.pop(KEY)})


HOSTILE: dict[str, Any] = {
    "another key": lambda p: p.update(extra=1),
    "no parts": lambda p: p.update({KEY: {}}),
    "parts of a list": lambda p: p.update({KEY: [torch.zeros(1)]}),
    "a part of a list": lambda p: p[KEY].update(codes=[1, 2]),
    "one part more": lambda p: p[KEY].update(more=torch.zeros(1)),
    "one part less": lambda p: p[KEY].pop("scales"),
    "two encodings": lambda p: p.update({KEY.replace("group=32", "group=64"): dict(p[KEY])}),
    "parts nested without end": lambda p: p.update({KEY: deep(100)}),
    "thousands of parts": lambda p: p[KEY].update({f"p{i}": torch.zeros(1) for i in range(5000)}),
    "a huge shape": rename("4,40", str(2**60)),
    "a size beyond int64": rename("4,40", "1" + "0" * 4300),
    "a negative size": rename("4,40", "-4,40"),
    "a size of a word": rename("4,40", "True,160"),
    "thousands of dimensions": rename("4,40", ",".join(["1"] * 5000)),
    "an unknown dtype": rename("float32", "float8"),
    "an unknown codec": rename("companded", "nope"),
    "a codec without fields": rename(
        "companded(version=3,curve=softsign,bits=8,group=32,per_octave=0,top=0,rows=first)", "x"
    ),
    "a codec version": rename("version=3", "version=99"),
    "a codec field": rename("group=32", "group=many"),
    "a codec field twice": rename("group=32", "group=32,name=raw"),
    "an integer tensor companded": rename("float32", "int64"),
}
HOSTILE_FIRST: dict[str, Any] = {
    "another key": lambda p: p.update(extra=1),
    "no parts": lambda p: p.pop("parts"),
    "parts of a list": lambda p: p.update(parts=[torch.zeros(1)]),
    "a part of a list": lambda p: p["parts"].update(codes=[1, 2]),
    "one part more": lambda p: p["parts"].update(more=torch.zeros(1)),
    "a huge shape": lambda p: p.update(shape=[2**60]),
    "a negative size": lambda p: p.update(shape=[-4, 40]),
    "true as a size": lambda p: p.update(shape=[True, 160]),
    "thousands of dimensions": lambda p: p.update(shape=[1] * 5000),
    "a shape of text": lambda p: p.update(shape="4x40"),
    "an unknown dtype": lambda p: p.update(dtype="float8"),
    "a dtype of a number": lambda p: p.update(dtype=32),
    "an unknown codec": lambda p: p.update(codec={"name": "nope"}),
    "a codec of text": lambda p: p.update(codec="companded"),
    "a codec version": lambda p: p["codec"].update(version=99),
    "a codec field": lambda p: p["codec"].update(group="many"),
    "an integer tensor companded": lambda p: p.update(dtype="int64"),
}


def deep(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {"codes": torch.zeros(1)}
    for _ in range(levels):
        value = {"x": value}
    return value


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_forms_are_refused(what: str) -> None:
    plain = good()
    HOSTILE[what](plain)
    with pytest.raises(StatecodecError):
        from_plain(plain)


@pytest.mark.parametrize("what", HOSTILE_FIRST)
def test_hostile_forms_of_the_first_version_are_refused(what: str) -> None:
    plain = first_form(from_plain(good()))
    HOSTILE_FIRST[what](plain)
    with pytest.raises(StatecodecError):
        from_plain(plain)


@given(st.text(max_size=40) | st.text("[]()., =0123456789abcfloat", max_size=60))
def test_any_key_is_a_form_or_our_error(text: str) -> None:
    for key in (text, f"float32[4,40] {text}", f"float32[{text}] raw(version=1)"):
        with contextlib.suppress(StatecodecError):
            from_plain({key: {"data": torch.zeros(4, 40)}})


def test_other_values_are_not_plain() -> None:
    assert not any(is_plain(v) for v in (None, 3, "codec", [], {}, {"codec": 1}, {"a[b] c": 1}, torch.zeros(2)))
    with pytest.raises(FormatError):
        from_plain({})


def test_declared_shapes_allocate_nothing() -> None:
    """A form that claims 2**40 elements is refused by its parts before anything of that size exists."""
    with pytest.raises(FormatError):
        from_plain({f"float32[{2**40}] raw(version=1)": {"data": torch.zeros(4)}})
    assert isinstance(from_plain(good()), EncodedTensor)
