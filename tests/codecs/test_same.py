"""The codec of tensors that are others again: any dtype, every bit, nothing taken that differs."""

from __future__ import annotations

import pytest
import torch

from statecodec import codecs
from statecodec.errors import FormatError, UnencodableValues

VALUES = torch.tensor([[0.0, -0.0, 1.0], [torch.nan, -torch.inf, 1e-40]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64])
def test_every_bit_is_the_original_s(dtype: torch.dtype) -> None:
    x = VALUES.to(dtype)
    encoded = codecs.Same().encode(x, companions={"original": x.clone()})
    assert dict(encoded.parts) == {}
    back = encoded.decode(companions={"original": x.reshape(-1)})
    assert torch.equal(back.contiguous().view(torch.uint8), x.view(torch.uint8))
    assert back.data_ptr() != x.data_ptr()


def test_whole_numbers_too() -> None:
    x = torch.arange(12, dtype=torch.int64).view(3, 4)
    assert torch.equal(codecs.Same().encode(x, companions={"original": x}).decode(companions={"original": x}), x)


@pytest.mark.parametrize("place", [(0, 0), (1, 0), (1, 2)])
def test_one_bit_more_is_refused(place: tuple[int, int]) -> None:
    other = VALUES.clone()
    other.view(torch.int32)[place] += 1
    with pytest.raises(UnencodableValues, match="no copy"):
        codecs.Same().encode(other, companions={"original": VALUES})


@pytest.mark.parametrize("original", [VALUES[:1], VALUES.double(), None])
def test_an_original_of_another_kind_is_refused(original: torch.Tensor | None) -> None:
    given = {} if original is None else {"original": original}
    encoded = codecs.EncodedTensor(codecs.Same(), (2, 3), torch.float32, {})
    with pytest.raises(FormatError, match="original"):
        encoded.decode(companions=given)
