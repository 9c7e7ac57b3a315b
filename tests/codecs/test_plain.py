"""The plain-dict form: what stands in it, that it survives torch's files, and that hostile ones are refused."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from statecodec.codecs import Codec, Companded, EncodedTensor, Folded, LowRank, Raw, Shared, Split
from statecodec.codecs.plain import from_plain, is_plain, to_plain
from statecodec.errors import FormatError, StatecodecError

CODECS: list[Codec] = [
    Raw(), Split(), Companded(bits=4), Companded("sqrt", group=32), Folded(2, Companded(group=32)), Shared((0,)),
    LowRank(3),
]  # fmt: skip


@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.name)
def test_round_trip_through_a_file(codec: Codec) -> None:
    encoded = codec.encode(torch.rand(6, 70))
    plain = to_plain(encoded)
    assert is_plain(plain)
    assert set(plain) == {"codec", "shape", "dtype", "parts"}
    assert all(plain["parts"][k] is t for k, t in encoded.parts.items())
    file = io.BytesIO()
    torch.save({"exp_avg": plain}, file)
    file.seek(0)
    loaded = from_plain(torch.load(file, weights_only=True)["exp_avg"])
    assert (loaded.codec, loaded.shape, loaded.dtype) == (codec, (6, 70), torch.float32)
    assert torch.equal(loaded.decode(), encoded.decode())


def test_the_documented_example() -> None:
    plain = to_plain(Companded(group=32).zeros((4, 40), torch.float32))
    assert plain["codec"]["name"] == "companded"
    assert plain["codec"]["version"] == 2
    assert plain["shape"] == [4, 40]
    assert plain["dtype"] == "float32"
    assert {k: (str(t.dtype), list(t.shape)) for k, t in plain["parts"].items()} == {
        "codes": ("torch.int8", [4, 40]), "scales": ("torch.bfloat16", [4, 2]),
    }  # fmt: skip


def good() -> dict[str, Any]:
    return to_plain(Companded(group=32).encode(torch.rand(4, 40)))


HOSTILE: dict[str, Any] = {
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


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_forms_are_refused(what: str) -> None:
    plain = good()
    HOSTILE[what](plain)
    with pytest.raises(StatecodecError):
        from_plain(plain)


def test_other_values_are_not_plain() -> None:
    assert not any(is_plain(v) for v in (None, 3, "codec", [], {}, {"codec": 1}, torch.zeros(2)))
    with pytest.raises(FormatError):
        from_plain({})


def test_declared_shapes_allocate_nothing() -> None:
    """A form that claims 2**40 elements is refused by its parts before anything of that size exists."""
    with pytest.raises(FormatError):
        from_plain({**to_plain(Raw().encode(torch.zeros(4))), "shape": [2**40]})
    assert isinstance(from_plain(good()), EncodedTensor)
