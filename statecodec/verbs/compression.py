"""A source with its choices on its way into a file: its chunks as they are written, and the document about them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from statecodec import codecs, kernels
from statecodec._version import __version__
from statecodec.checkpoint import document as documents
from statecodec.checkpoint import states
from statecodec.checkpoint.chain import BaseCheckpoint
from statecodec.checkpoint.digests import FileHashes, FileToHash
from statecodec.checkpoint.report import Report
from statecodec.checkpoint.shared_reads import SharedReads
from statecodec.checkpoint.source import SourceCheckpoint
from statecodec.checkpoint.source_crcs import SourceCrcs
from statecodec.checkpoint.source_items import SourceItem
from statecodec.checkpoint.stored import StoredCheckpoint
from statecodec.choose.choices import Choices
from statecodec.choose.low_rank import is_low_rank
from statecodec.choose.widths import finer
from statecodec.codecs import Change, Codec, Encoding
from statecodec.codecs.changes import subtract_parts, subtract_values
from statecodec.codecs.chunking import Chunk
from statecodec.codecs.parts import Companions
from statecodec.dtypes import FLOAT32
from statecodec.format import ItemSpec
from statecodec.kernels.reference.statistics import Comparison
from statecodec.verbs.appending import EncodedChunk, ErrorRules, WriteOptions
from statecodec.verbs.paths import named
from statecodec.verbs.processors import Processor, compared
from statecodec.verbs.settings import CompressSettings
from statecodec.verbs.step_errors import TRAINED_ROLES, StepErrors
from statecodec.verbs.verify import check_intact, report_against
from statecodec.verbs.writing import Verification, write

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Compression:
    """A source with its choices: makes the chunks to be written, and the document that describes them."""

    source: SourceCheckpoint
    choices: Choices
    base: BaseCheckpoint | None
    processor: Processor
    settings: CompressSettings
    totals: StepErrors = field(default_factory=StepErrors)
    recoded: dict[int, Codec] = field(default_factory=dict)
    """Of items whose chosen codec refused their values, or missed the promise: the codec that they have instead."""
    shared: SharedReads | None = None
    """With whom reads of the source are shared, if with anybody."""
    crcs: SourceCrcs | None = None
    """Checks what is read."""

    def write(self, output: WriteOptions, verification: Verification | None = None) -> Report:
        """Write the compressed checkpoint; the source's digests are taken meanwhile. Raises as `compress` does."""
        shared = SharedReads(self.source) if self.source.on_disk and self.settings.stores_sha256 else None
        work = replace(self, shared=shared).checked(range(len(self.source.items)))
        with self.hashing(self.source.own_files if shared else (), shared) as hashes:

            def document(refusals: Mapping[str, str]) -> dict[str, Any]:
                digests = hashes()
                work.finish_reading()
                return self.document(digests, refusals)

            outcome = write(
                output,
                [self.item(i) for i in range(len(self.source.items))],
                work.encode,
                document,
                "compressing",
                fallback=self.instead,
                verification=verification,
                errors=ErrorRules(self.figures, self.finer),
            )
        report = outcome.report(output)
        total = {**(self.totals.figures() or {}), **(report.total or {})}
        return replace(report, unmet=self.choices.unmet, total=total or None)

    def checked(self, items: Collection[int]) -> Compression:
        """The same, with the CRCs of the records of these items checked while they are read."""
        return replace(self, crcs=SourceCrcs(self.source, items) if self.source.on_disk else None)

    def finish_reading(self) -> None:
        """Check the CRCs of what was not read, and that no file changed. Raises MalformedCheckpoint, LayoutError."""
        if self.crcs is not None:
            self.crcs.finish()
        self.source.files.check_unchanged()

    @contextlib.contextmanager
    def hashing(
        self, files: Sequence[int], shared: SharedReads | None = None
    ) -> Iterator[Callable[[], dict[int, str]]]:
        """Hash these files of the source while the block runs; the function waits for their SHA-256."""
        located = self.source.located.files
        watched = [FileToHash(self.source.files.path(i), located[i].nbytes, i) for i in files]
        hashes = FileHashes(watched, shared=shared)
        hashes.start()
        try:
            yield lambda: dict(zip(files, hashes.digests(), strict=False))
        finally:
            hashes.cancel()

    def item(self, index: int) -> ItemSpec:
        """What is stored for an item of the source, and how."""
        item = self.source.items[index]
        choice = self.choices[item.name]
        attributes: dict[str, Any] = {"role": item.role}
        if item.region is not None:
            attributes["param"] = item.param
            if item.state is not None:
                attributes[states.ATTRIBUTE] = states.to_json(item.state)
        return ItemSpec(
            item.name,
            choice.encoding,
            item.shape,
            item.dtype,
            attributes,
            choice.companions,
            text=item.region is None,
            low_rank=is_low_rank(item),
        )

    def encode(self, index: int, encoding: Encoding, chunk: Chunk) -> EncodedChunk:
        """A chunk of an item of the source."""
        item, codec = self.source.items[index], encoding.codec
        x, data = (self.shared or self.source).chunk_with_memory(item, chunk, self.processor.scratch)
        if self.crcs is not None:
            self.crcs.add(item, chunk, data)
        if encoding.change is None:
            return self._encoded(item, codec, x, chunk)
        assert self.base is not None  # `linked` chose the change
        if encoding.change is Change.VALUES:
            parts, decoded = subtract_values(codec, x, self.base.values(item, chunk))
            return EncodedChunk(parts, compared(codec, x, decoded, {}))
        encoded = self._encoded(item, codec, x, chunk)
        return replace(encoded, parts=subtract_parts(encoded.parts, self.base.parts(item, codec, chunk)))

    def _encoded(self, item: SourceItem, codec: Codec, x: Tensor, chunk: Chunk) -> EncodedChunk:
        if isinstance(codec, codecs.Raw):
            return EncodedChunk({"data": x})
        companions = self._companions(item, codec, chunk)
        if codec.repeats:
            codec.encode_into(x, {}, kernels.host(), companions)
            return EncodedChunk({})
        # What is decoded in 16 bits is rounded beside the companion that the reader has.
        beside = self._as_read(item, companions) if codec.needs and item.dtype != FLOAT32 else companions
        return EncodedChunk(*self.processor.encode(codec, x, companions, beside))

    def instead(self, index: int) -> Codec:
        """The codec for an item whose chosen codec refused its values."""
        codec = codecs.Raw() if index in self.recoded else self.choices[self.source.items[index].name].otherwise
        self.recoded[index] = codec
        return codec

    def _companions(self, item: SourceItem, codec: Codec, chunk: Chunk) -> Companions:
        """The companions' values of the same elements: from the source, or as the reader will decode them."""
        values = {
            role: self.source.chunk(self._companion(item, role), chunk, self.processor.scratch, role)
            for role in codec.needs
        }
        return self._as_read(item, values) if codec.needs_decoded else values

    def _as_read(self, item: SourceItem, companions: Companions) -> Companions:
        """Companions of the source as the reader will decode them."""
        values = {}
        for role, x in companions.items():
            other = self._companion(item, role)
            values[role] = self.processor.decoded(self.recoded.get(other.index, self.choices[other.name].codec), x)
        return values

    def _companion(self, item: SourceItem, role: str) -> SourceItem:
        return self.source.items[self.source.tensors[self.choices[item.name].companions[role]].index]

    def figures(self, index: int, c: Comparison) -> dict[str, float]:
        """The error of one tensor: of its values, or, if it is stored as a direction, of the update alone."""
        item = self.source.items[index]
        choice, relative = self.choices[item.name], math.sqrt(c.sum_sq_diff / c.sum_sq) if c.sum_sq else 0.0
        unit, step = choice.unit, choice.step
        if step is not None:  # not in units of the sum of squares: m / eps where v is 0 would drown all others
            size = step.numel * step.update**2
            error = c.sum_sq_diff * (step.update / step.direction) ** 2
            self.totals.add("u_rms", error, size)
            return {"step_error": math.sqrt(error / size)}
        if "exp_avg_sq" in choice.companions:
            self.totals.add("u_rms", c.sum_sq_diff, c.sum_sq)
            return {"step_error": relative}
        rms = math.sqrt(c.sum_sq_diff / max(item.numel, 1))
        figures = {"rms": rms, "relative_rms": relative, "max_abs": c.max_abs_diff}
        if unit is not None:
            figures["step_error"] = rms / unit
            if item.role in TRAINED_ROLES:
                self.totals.add("weight_step_error", c.sum_sq_diff / unit**2, item.numel)
            elif item.name in self.source.lone_momenta:
                self.totals.add("momentum_step_error", c.sum_sq_diff / unit**2, item.numel)
        return figures

    def finer(self, index: int, codec: Codec, sums: Comparison) -> Codec | None:
        """The codec to encode an item with again, if its error is above what is promised; None if it is not."""
        item = self.source.items[index]
        most = self.choices[item.name].most
        if most is None:
            return None
        codec_again = finer(codec, most, sums, item.numel)
        if codec_again is not None:
            self.recoded[index] = codec_again
        return codec_again

    def document(self, digests: Mapping[int, str], refusals: Mapping[str, str]) -> dict[str, Any]:
        """The document's JSON. `digests`: file -> SHA-256."""
        source, located = self.source, self.source.located
        every = [digests.get(i) for i in range(len(located.files))]
        refused = tuple(f"{name}: {self._outcome(name)}: {reason}" for name, reason in refusals.items())
        described = documents.Document(
            created_by=f"statecodec {__version__}",
            preset=self.settings.named_preset,
            rules=tuple(str(rule) for rule in self.settings.policy.rules),
            source={
                "name": named(source.path).name,
                **source.kind,
                "bytes": source.nbytes,
                "sha256": None if located.is_directory else every[0],
            },
            files=source.stored_files(every),
            folders=located.folders,
            notes=(*self.choices.notes, *self.choices.kept.notes(self.settings.budget), *refused),
            base=self.base.file if self.base else None,
            tensors=tuple(source.joined.values()),
            asked=self.choices.kept.figures(self.settings.promised),
        )
        return documents.to_json(described, source.items)

    def _outcome(self, name: str) -> str:
        """What became of a tensor whose chosen codec refused its values."""
        codec = self.recoded.get(self.source.tensors[name].index, self.choices[name].codec)
        return "kept exact" if codec.exact else f"stored as {codec.name}"


def verification_of(source: SourceCheckpoint, output: WriteOptions) -> Verification:
    """What reads a finished output back and compares it with its source."""

    def verified(stored: StoredCheckpoint) -> Report:
        check_intact(stored, output.threads, output.progress)
        return report_against(stored, source, output.threads, output.progress)

    return verified
