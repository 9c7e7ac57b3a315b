"""Scratch memory is used again, by one user at a time."""

from __future__ import annotations

import torch

from statecodec.buffers import ThreadScratch


def test_a_part_may_be_called_anything() -> None:
    """Whatever a codec calls its parts, they are not the memory of another use."""
    scratch = ThreadScratch()
    decoded = scratch.take("decoded", torch.float32, (8,)).fill_(1)
    source = scratch.take("source", torch.float32, (8,)).fill_(2)
    for name in ("decoded", "source", "part", ""):
        scratch.take("part", torch.float32, (8,), name).fill_(3)
    assert (decoded == 1).all()
    assert (source == 2).all()


def test_memory_is_used_again() -> None:
    scratch = ThreadScratch()
    first = scratch.take("x", torch.float32, (1000,))
    assert scratch.take("x", torch.int16, (3, 5)).data_ptr() == first.data_ptr()
    assert scratch.take("x", torch.float64, ()).shape == ()
    assert scratch.take("x", torch.float64, (0, 5)).numel() == 0
    large = scratch.take("x", torch.uint8, (32 << 20,))
    assert scratch.take("x", torch.uint8, (8,)).data_ptr() != large.data_ptr(), "large buffers are not kept"
