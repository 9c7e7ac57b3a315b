"""From a located source and a policy to the list of items that will be stored."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from statecodec import codecs
from statecodec.checkpoint.document import StoredFile
from statecodec.checkpoint.skeleton import Skeleton
from statecodec.choose import Policy, Subject
from statecodec.codecs import Codec
from statecodec.errors import UnsupportedTensor
from statecodec.format import Item
from statecodec.layouts import Moments, Region, Source


@dataclass(frozen=True)
class PlannedItem:
    """One item to store: a region of a source file, or (`region` is None) that file's skeleton."""

    file: int
    region: Region | None
    item: Item

    @property
    def lossy(self) -> bool:
        return not codecs.is_exact(self.item.codec)


@dataclass(frozen=True)
class Plan:
    """All items in storage order (each file's skeleton, then its regions), and how the files are made of them."""

    source: Source
    items: tuple[PlannedItem, ...]
    skeletons: tuple[Skeleton, ...]
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the source, hard links counted once."""
        return sum(f.nbytes for f in self.source.files if f.same_as is None)

    def stored_files(self, digests: Sequence[str | None]) -> tuple[StoredFile, ...]:
        """The files as the document describes them."""
        regions: list[list[tuple[int, int]]] = [[] for _ in self.source.files]
        skeleton: list[int | None] = [None] * len(self.source.files)
        for index, planned in enumerate(self.items):
            if planned.region is None:
                skeleton[planned.file] = index
            else:
                regions[planned.file].append((planned.region.offset, index))
        return tuple(
            StoredFile(
                path=f.path,
                nbytes=f.nbytes,
                mode=f.mode,
                layout=f.layout,
                sha256=digest,
                regions=tuple(regions[i]),
                skeleton=skeleton[i],
                views=f.views,
                crcs=f.crcs,
                moments=self.moments(i),
                same_as=f.same_as,
                note=f.note,
            )
            for i, (f, digest) in enumerate(zip(self.source.files, digests, strict=True))
        )

    def moments(self, file: int) -> tuple[Moments, ...]:
        """The moments of one file, with item names instead of the layout's region names."""
        names = {p.region.name: p.item.name for p in self.items if p.file == file and p.region is not None}
        return tuple(
            replace(
                m,
                exp_avg=names[m.exp_avg],
                exp_avg_sq=names[m.exp_avg_sq],
                weight=names[m.weight] if m.weight else None,
            )
            for m in self.source.files[file].moments
        )


def make_plan(
    source: Source, policy: Policy, refused: Collection[str] = (), chosen: Mapping[str, Codec] | None = None
) -> Plan:
    """Choose a codec for every region: that of `chosen`, by item name, or the policy's.

    Items named in `refused` (their values cannot be encoded) are kept raw.
    """
    items: list[PlannedItem] = []
    skeletons, notes = [], []
    taken: set[str] = set()
    for index, file in enumerate(source.files):
        skeleton = Skeleton(file.nbytes, ((r.offset, r.nbytes) for r in file.regions))
        skeletons.append(skeleton)
        if file.note:
            notes.append(f"{file.path}: {file.note}")
        if file.same_as is not None:
            continue
        prefix = f"{file.path}:" if source.is_directory else ""
        if skeleton.nbytes:
            role = "file" if not file.regions else "skeleton"
            name = _unique(f"{prefix}{role}", taken)
            items.append(_item(index, None, name, codecs.Raw(), torch.uint8, (skeleton.nbytes,), {"role": role}))
        for region in file.regions:
            name = _unique(prefix + region.name, taken)
            given = None if chosen is None else chosen.get(name)
            codec, note = _choose(policy, name, region, name in refused, given)
            notes.extend(note)
            attributes = {"role": region.role, "param": region.param}
            items.append(_item(index, region, name, codec, region.dtype, region.shape, attributes))
    dropped = sum(isinstance(p.item.codec, codecs.Dropped) for p in items)
    if dropped:
        notes.append(f"{dropped} tensors are dropped and restore as zeros: training cannot resume from this file")
    return Plan(source, tuple(items), tuple(skeletons), tuple(notes))


def subject(region: Region, name: str) -> Subject:
    """What rules see of a region."""
    return Subject(name, region.role, region.param, region.shape, region.dtype)


def with_codec(planned: PlannedItem, codec: Codec) -> PlannedItem:
    """The same item under another codec."""
    return replace(planned, item=replace(planned.item, codec=codec))


def _choose(
    policy: Policy, name: str, region: Region, refused: bool, given: Codec | None
) -> tuple[Codec, tuple[str, ...]]:
    codec = given or policy.codec_for(subject(region, name))
    if isinstance(codec, codecs.Raw):
        return codecs.Raw(), ()
    if region.lossless:
        return codecs.Raw(), (f"{name}: kept exact, because several different views share its storage",)
    if refused:
        return codecs.Raw(), ()
    try:
        codec.parts(region.shape, region.dtype)
    except UnsupportedTensor as error:
        return codecs.Raw(), (f"{name}: kept exact: {error}",)
    return codec, ()


def _item(
    file: int,
    region: Region | None,
    name: str,
    codec: Codec,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    attributes: dict[str, Any],
) -> PlannedItem:
    return PlannedItem(file, region, Item(name=name, codec=codec, shape=shape, dtype=dtype, attributes=attributes))


def _unique(name: str, taken: set[str]) -> str:
    """A stored name nobody has: tensors may be called anything, and part names append `/part`."""
    candidate = name.replace("/", "|") or "tensor"
    candidate = f"tensor.{candidate}" if candidate.startswith("__") else candidate
    number = 2
    while candidate in taken:
        candidate, number = f"{name.replace('/', '|')}~{number}", number + 1
    taken.add(candidate)
    return candidate
