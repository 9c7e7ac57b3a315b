"""Scratch memory is used again, by one user at a time."""

from __future__ import annotations

import torch

from statecodec.buffers import ThreadScratch, memory


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


def test_shapes_that_alternate_are_the_same_views_until_the_buffer_grows() -> None:
    scratch = ThreadScratch()
    tall, wide = (scratch.take_with_memory("x", torch.float32, shape) for shape in ((6, 2), (2, 6)))
    assert scratch.take_with_memory("x", torch.float32, (6, 2)) is tall
    assert scratch.take_with_memory("x", torch.float32, (2, 6)) is wide
    tall[0].fill_(7.0)
    assert wide[1] == memory(wide[0]) == memory(torch.full((12,), 7.0))
    grown, data = scratch.take_with_memory("x", torch.float32, (1000,))
    assert scratch.take("x", torch.float32, (6, 2)).data_ptr() == grown.data_ptr() != tall[0].data_ptr()
    assert len(data) == 4000
    for n in range(1, 1000):
        scratch.take("x", torch.float32, (n,))
    assert max(map(len, scratch._views.values())) <= 64
