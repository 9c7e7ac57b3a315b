"""From one compressed form to another: tensors that a rule names are decoded and encoded anew, all others are
copied.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from statecodec import codecs, kernels
from statecodec.checkpoint.stored import Stored, report_of, text
from statecodec.checkpoint.tensor_sets import SKELETON_ROLES, is_compressed
from statecodec.choose import Policy, Rule, Subject, parse_rule
from statecodec.choose.rules import check_matched
from statecodec.codecs import Codec
from statecodec.codecs.chunking import Chunk, iterate
from statecodec.errors import UnencodableValues, UnsupportedTensor
from statecodec.format import Item, Packing, StoredItem, Writer
from statecodec.kernels.reference.statistics import NO_DIFFERENCE, Comparison
from statecodec.streams import Meter, Progress, default_threads, ordered_map
from statecodec.verbs.compress import compress
from statecodec.verbs.diff import diff
from statecodec.verbs.output_file import output_file
from statecodec.verbs.report import Report, TensorReport


@dataclass(frozen=True)
class _Planned:
    """One item: how it will be stored, and whether its parts are copied as they are."""

    item: Item
    copied: bool


def convert_codecs(
    src: str | Path,
    dst: str | Path,
    to: Sequence[str | Rule],
    *,
    pack: str = "zstd",
    strict: bool = False,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Store the tensors that rules of `to` name in other codecs; everything else stays as it is, bit for bit.

    `src` may be compressed or not. The report's tensor errors and update errors are against what `src` holds now. A
    link of a chain comes out standing alone. Raises UsageError, PolicyError, OutputExists, FormatError, LayoutError.
    """
    started = time.perf_counter()
    rules = tuple(parse_rule(rule) if isinstance(rule, str) else rule for rule in to)
    target = output_file(dst, None, force=force)
    if is_compressed(src):
        _convert(
            Path(src), target, Policy(rules), Packing.parse(pack), strict, force, threads or default_threads(), progress
        )
    else:
        options: dict[str, Any] = {
            "pack": pack,
            "strict": strict,
            "force": force,
            "threads": threads,
            "progress": progress,
        }
        compress(src, target, preset="lossless", rules=rules, **options)
    found = diff(src, target, threads=threads, progress=progress)
    report = report_of(target)
    lost = {t.name: {"rms": t.rms, "relative_rms": t.relative_rms, "max_abs": t.max_abs} for t in found.tensors}
    tensors = tuple(_with_error(t, lost.get(t.name)) for t in report.tensors)
    seconds = time.perf_counter() - started
    return replace(report, tensors=tensors, updates=found.updates, total=found.total, seconds=seconds)


def _with_error(tensor: TensorReport, lost: dict[str, float] | None) -> TensorReport:
    return replace(tensor, error=lost if lost and lost["max_abs"] else None)


def _convert(
    src: Path,
    target: Path,
    policy: Policy,
    packing: Packing,
    strict: bool,
    force: bool,
    threads: int,
    progress: Progress | None,
) -> None:
    with Stored.open(src) as stored:
        subjects = (_subject(item) for item in stored.reader.items)
        unmatched = check_matched(policy, subjects, strict=strict)
        planned, notes = _plan(stored, policy)
        notes = [*unmatched, *notes]
        document = _document(stored, policy, src, notes)
        meter = Meter(progress, sum(item.decoded_nbytes for item in stored.reader.items), "converting")
        with Writer(target, [p.item for p in planned], packing=packing, force=force) as writer:
            lost: dict[int, Comparison] = {}

            def encode(job: tuple[int, Chunk]) -> tuple[Any, int, Comparison | None]:
                index, chunk = job
                parts, comparison = _encode(stored, index, chunk, planned[index])
                nbytes = (chunk.stop - chunk.start) * planned[index].item.dtype.itemsize
                return writer.pack(index, chunk, parts), nbytes, comparison

            for packed, nbytes, comparison in ordered_map(encode, _jobs(planned), threads):
                writer.append(packed)
                meter.add(nbytes)
                if comparison is not None:
                    lost[packed.item] = lost.get(packed.item, NO_DIFFERENCE).merged(comparison)
            for index in lost:
                writer.set_attributes(index, _attributes(planned[index].item))
            writer.close(document)


def _plan(stored: Stored, policy: Policy) -> tuple[list[_Planned], list[str]]:
    planned, notes = [], []
    for index, item in enumerate(stored.reader.items):
        role = text(item.attributes.get("role")) or "other"
        # A residual has no form of its own: without its base it is the numbers it decodes to.
        now = codecs.Raw() if isinstance(item.codec, codecs.Residual) else codecs.standalone(item.codec)
        rule = None if role in SKELETON_ROLES else policy.rule_for(_subject(item))
        codec: Codec = now if rule is None else rule.codec
        if rule is not None and codec != now:
            refused = _refusal(stored, index, codec)
            if refused:
                notes.append(f"{item.name}: left as it is: {refused}")
                codec = now
        copied = codec == now and not isinstance(item.codec, codecs.Residual)
        planned.append(_Planned(Item(item.name, codec, item.shape, item.dtype, dict(item.attributes)), copied))
    return planned, notes


def _subject(item: StoredItem) -> Subject:
    """What rules see of a stored item."""
    attributes = item.attributes
    role = text(attributes.get("role")) or "other"
    return Subject(item.name, role, text(attributes.get("param")), item.shape, item.dtype)


def _refusal(stored: Stored, index: int, codec: Codec) -> str | None:
    """Why a codec cannot take a tensor; every chunk is tried, since nothing may be written that has to be taken
    back.
    """
    item = stored.reader.items[index]
    if isinstance(codec, codecs.Based):
        return f"{codec.name} needs a base; compress --base makes links"
    try:
        for chunk in iterate(codec, item.shape, item.dtype):
            codec.encode(stored.decode_range(index, chunk.start, chunk.stop).view(chunk.shape))
    except (UnsupportedTensor, UnencodableValues) as error:
        return str(error)
    return None


def _jobs(planned: Sequence[_Planned]) -> Iterator[tuple[int, Chunk]]:
    for index, p in enumerate(planned):
        for chunk in iterate(p.item.codec, p.item.shape, p.item.dtype):
            yield index, chunk


def _encode(
    stored: Stored, index: int, chunk: Chunk, planned: _Planned
) -> tuple[Mapping[str, Tensor], Comparison | None]:
    if planned.copied:
        return stored.parts(index, stored.chunk_at(index, chunk))[1], None
    x = stored.decode_range(index, chunk.start, chunk.stop).view(chunk.shape)
    encoded = planned.item.codec.encode(x)
    found = kernels.host().compare(x.reshape(-1).float(), encoded.decode().reshape(-1).float())
    return encoded.parts, found


def _attributes(item: Item) -> dict[str, Any]:
    """What is known of a converted tensor: its error against the first original is not, so it is no longer stated."""
    return {k: v for k, v in item.attributes.items() if k != "error"}


def _document(stored: Stored, policy: Policy, src: Path, notes: Sequence[str]) -> dict[str, Any]:
    document = {k: v for k, v in stored.reader.document.items() if k != "base"}
    rules = [*(str(rule) for rule in policy.rules), *stored.document.rules]
    return {**document, "rules": rules, "notes": [*stored.document.notes, f"converted from {src.name}", *notes]}
