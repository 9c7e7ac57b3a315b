"""From one compressed form to another: decodes and encodes anew what a rule names, and copies the rest."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from statecodec import codecs
from statecodec.checkpoint.base import TensorInfo
from statecodec.checkpoint.document import ASKED
from statecodec.checkpoint.open import open_checkpoint
from statecodec.checkpoint.report import Report, TensorReport
from statecodec.checkpoint.stored import StoredCheckpoint
from statecodec.choose import Policy, Rule, parse_rule
from statecodec.choose.low_rank import is_low_rank
from statecodec.choose.rules import unmatched_notes
from statecodec.codecs import Codec, Encoding
from statecodec.codecs.chunking import Chunk
from statecodec.errors import UnsupportedTensor
from statecodec.format import ItemSpec, Packing
from statecodec.parallel import default_threads
from statecodec.progress import Progress
from statecodec.roles import SKELETON_ROLES
from statecodec.verbs.appending import EncodedChunk, WriteOptions
from statecodec.verbs.compression import Compression
from statecodec.verbs.diff import compare
from statecodec.verbs.output_file import output_file
from statecodec.verbs.processors import Cpu
from statecodec.verbs.settings import CompressSettings
from statecodec.verbs.writing import Verification, write


def convert_codecs(
    src: str | Path,
    dst: str | Path,
    to: Sequence[str | Rule],
    *,
    pack: str = "auto",
    strict: bool = False,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Store the tensors that rules of `to` name with other codecs; everything else stays as it is, bit for bit.

    `src` may be compressed or not. The errors in the report are measured against what `src` holds now. A link of a
    chain becomes a file that needs no base. Raises UsageError, PolicyError, OutputExists, FormatError, LayoutError.
    """
    started = time.perf_counter()
    rules = tuple(parse_rule(rule) if isinstance(rule, str) else rule for rule in to)
    Policy(rules).refuse_changes("`compress --base` makes links, `convert` files that stand alone")
    target = output_file(dst, None, force=force)
    output = WriteOptions(
        target, Packing.parse(pack), force=force, threads=threads or default_threads(), progress=progress
    )
    with open_checkpoint(src, crcs=False) as checkpoint:

        def verified(stored: StoredCheckpoint) -> Report:
            comparison, report = compare(checkpoint, stored, output.threads, progress), stored.report()
            lost = {
                t.name: {"rms": t.rms, "relative_rms": t.relative_rms, "max_abs": t.max_abs} for t in comparison.tensors
            }
            tensors = tuple(_with_error(t, lost.get(t.name)) for t in report.tensors)
            return replace(report, tensors=tensors, updates=comparison.updates, total=comparison.total)

        if isinstance(checkpoint, StoredCheckpoint):
            report = Recoding(checkpoint, Policy(rules), strict=strict).write(output, verified)
        else:
            settings = CompressSettings.of(preset="lossless", rules=rules, strict=strict, pack=pack)
            choices = settings.choose(checkpoint, None, output.threads)
            work = Compression(checkpoint, choices, None, Cpu(), settings)
            report = work.write(output, verified)
    return replace(report, seconds=time.perf_counter() - started)


def _with_error(tensor: TensorReport, lost: dict[str, float] | None) -> TensorReport:
    return replace(tensor, error=lost if lost and lost["max_abs"] else None)


class Recoding:
    """A compressed checkpoint in other codecs: makes the chunks to be written, and the document."""

    def __init__(self, stored: StoredCheckpoint, policy: Policy, *, strict: bool = False) -> None:
        """Choose: a tensor that a rule names gets the rule's codec if that takes it; others keep their own."""
        self.stored, self.policy = stored, policy
        self.notes = list(unmatched_notes(policy, stored.items, strict=strict))
        # A change of values has no own parts: without the base it is stored as its decoded values.
        self._now = [item.encoding.standalone or codecs.Raw() for item in stored.reader.items]
        self._chosen = [self._choose(tensor) for tensor in stored.items]
        # An item whose companion is encoded anew is stored as its decoded values.
        for index, item in enumerate(stored.reader.items):
            others = [stored.tensors[name].index for name in item.companions.values()]
            if any(self._chosen[other] != self._now[other] for other in others):
                kept = self._chosen[index] == self._now[index]
                self._now[index] = codecs.Raw()
                self._chosen[index] = codecs.Raw() if kept else self._chosen[index]

    def write(self, output: WriteOptions, verification: Verification) -> Report:
        """Write the result, and give its report as checked before publishing. Raises as `convert_codecs` does."""
        items = [
            ItemSpec(
                item.name,
                Encoding(codec),
                item.shape,
                item.dtype,
                self._attributes(tensor.index),
                item.companions,
                low_rank=is_low_rank(tensor),
            )
            for tensor, item, codec in zip(self.stored.items, self.stored.reader.items, self._chosen, strict=True)
        ]
        outcome = write(
            output,
            items,
            self._encode,
            self._document,
            "converting",
            fallback=self._now.__getitem__,
            verification=verification,
        )
        return outcome.report(output)

    def _choose(self, tensor: TensorInfo) -> Codec:
        now = self._now[tensor.index]
        rule = None if tensor.role in SKELETON_ROLES else self.policy.rule_for(tensor)
        if rule is None:
            return now
        try:
            codec = rule.encoding.codec
            if codec.needs:
                raise UnsupportedTensor(f"{codec.name} is made by compress, beside its companions")
            codec.parts(tensor.shape, tensor.dtype)
        except UnsupportedTensor as error:
            self.notes.append(f"{tensor.name}: left as it is: {error}")
            return now
        return codec

    def _encode(self, index: int, encoding: Encoding, chunk: Chunk) -> EncodedChunk:
        item, codec = self.stored.reader.items[index], encoding.codec
        if codec == item.encoding.standalone:
            return EncodedChunk(self.stored.parts(index, self.stored.chunk_at(index, chunk)))
        x = self.stored.decode_range(index, chunk.start, chunk.stop).view(chunk.shape)
        return EncodedChunk(codec.encode(x).parts)

    def _attributes(self, index: int) -> dict[str, Any]:
        """A converted tensor's error against the first original is not known, so it is no longer stated."""
        item = self.stored.reader.items[index]
        kept = self._chosen[index] == self._now[index]
        return {k: v for k, v in item.attributes.items() if kept or k != "error"}

    def _document(self, refusals: Mapping[str, str]) -> dict[str, Any]:
        gone = {"base"} if self._chosen == self._now else {"base", "preset", ASKED}  # errors are not promised
        document = {k: v for k, v in self.stored.reader.document.items() if k not in gone}
        rules = [*(str(rule) for rule in self.policy.rules), *self.stored.document.rules]
        left = [f"{name}: left as it is: {reason}" for name, reason in refusals.items()]
        notes = [*self.stored.document.notes, f"converted from {self.stored.path.name}", *self.notes, *left]
        return {**document, "rules": rules, "notes": notes}
