"""Finds tensors that are copies of others of the same checkpoint, so that they are stored once.

Examples are an average that has not moved yet, a model saved both alone and with its optimizer, and two checkpoints of
one step. Samples find candidates; encoding proves that every bit is equal.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import replace
from typing import Final

from statecodec import codecs
from statecodec.buffers import memory
from statecodec.checkpoint.source import SourceCheckpoint
from statecodec.checkpoint.source_items import SourceItem
from statecodec.choose.choices import Choice, Choices
from statecodec.choose.samples import sample
from statecodec.codecs import Change, Encoding
from statecodec.codecs.chunking import CHUNK_ELEMENTS
from statecodec.format import Packing
from statecodec.roles import family

_MIN_BYTES: Final = 4096


def repeated(
    source: SourceCheckpoint, choices: Choices, packing: Packing, only: Container[str] | None = None
) -> Choices:
    """The same choices, with tensors that seem to repeat another stored as that one, where both are stored alike.

    With packing `none` nothing changes, because a file that is mapped has to hold every tensor.

    `only`: the names that are looked at; a tensor with all of its copies.
    """
    if packing.method == "none":
        return choices
    originals: dict[str, str] = {}
    repeats: dict[str, Choice] = {}
    made_exact: dict[str, Choice] = {}
    pairs = [pair for group in copies(source, only) for pair in _with_original(group, choices)]
    # Tensors with companions come last: the originals of their companions are known then.
    for item, other in sorted(pairs, key=lambda pair: bool(choices[pair[0].name].companions)):
        choice, first = choices[item.name], made_exact.get(other.name, choices[other.name])
        follows = _has_no_step(item, choice) and family(other.role) == "weight" and first.unit is not None
        if not follows and _shall_be_exact(choice, first):  # one exact tensor is smaller than a lossy and an exact one
            reason = f"{item.name} is the same, and kept exact"
            first = made_exact[other.name] = replace(choice, reason=reason, unit=first.unit)
        if _is_alike(first if follows else choice, first, tuple(item.shape), originals):
            originals[item.name] = other.name
            reason = f"it is the same as {other.name}"
            repeats[item.name] = replace(
                choice,
                encoding=Encoding(codecs.Same()),
                reason=reason,
                companions={"original": other.name},
                otherwise=codecs.Raw() if choice.codec.needs else choice.codec,
            )
    choices = replace(choices, by_name={**choices.by_name, **made_exact})
    for name, choice in choices.items():  # a companion must need no other tensor
        if name not in repeats:
            for needed in choice.companions.values():
                repeats.pop(needed, None)
    return replace(choices, by_name={**choices.by_name, **repeats})


def copies(source: SourceCheckpoint, only: Container[str] | None = None) -> list[list[SourceItem]]:
    """Tensors in `only` whose dtype, shape and samples are the same: groups of two or more, in the source's order."""
    alike: dict[tuple[object, ...], list[SourceItem]] = {}
    for item in source.items:
        if item.nbytes >= _MIN_BYTES and (only is None or item.name in only):
            alike.setdefault((item.dtype, tuple(item.shape), item.region is None), []).append(item)
    groups = []
    for group in alike.values():
        by_sample: dict[bytes, list[SourceItem]] = {}
        for item in group if len(group) > 1 else ():
            values = bytes(memory(sample(source, item)))
            if any(values):  # all-zero tensors are left out: they pack to nothing
                by_sample.setdefault(values, []).append(item)
        groups += [same for same in by_sample.values() if len(same) > 1]
    return groups


def _with_original(group: list[SourceItem], choices: Choices) -> list[tuple[SourceItem, SourceItem]]:
    """Each tensor with the one that it may repeat: the first one whose step is known, or else the first."""
    original = group[0]
    if _has_no_step(original, choices[original.name]):
        original = next((item for item in group if choices[item.name].unit is not None), original)
    return [(item, original) for item in group if item is not original]


def _has_no_step(item: SourceItem, choice: Choice) -> bool:
    """Whether a weight is stored exactly only because no step is known that trains it.

    Such are a tied weight under its second name, and fp32 weights that have masters. As near as the twin is then near
    enough. An average is left out, because it moves less than its weights.
    """
    is_copy = family(item.role) == "weight" and item.role != "ema"
    return is_copy and choice.exact and not choice.settled and choice.unit is None and not choice.companions


def _shall_be_exact(choice: Choice, first: Choice) -> bool:
    """Whether an original that may be lossy is stored exactly, because a copy of it has to be exact anyway."""
    lossy = not (first.exact or first.settled or first.encoding.change or isinstance(first.codec, codecs.Dropped))
    return lossy and not choice.settled and choice.encoding == Encoding(codecs.Raw())


def _is_alike(choice: Choice, first: Choice, shape: tuple[int, ...], originals: Mapping[str, str]) -> bool:
    """Whether what the original decodes to is as near as the copy has to be."""
    if isinstance(choice.codec, codecs.Dropped) or (
        first.codec.align(shape) is None and math.prod(shape) > CHUNK_ELEMENTS
    ):
        return False  # else each chunk would decode all of the original
    if first.codec.exact and first.encoding.change is not Change.VALUES:
        return True
    return (
        choice.encoding == first.encoding
        and not choice.settled
        and _of_originals(choice, originals) == first.companions
    )


def _of_originals(choice: Choice, originals: Mapping[str, str]) -> Mapping[str, str]:
    return {role: originals.get(name, name) for role, name in choice.companions.items()}
