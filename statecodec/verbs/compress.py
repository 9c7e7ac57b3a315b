"""Source checkpoint -> compressed file: choose a codec for every tensor, then write, streamed."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from statecodec import choose, codecs, kernels
from statecodec._version import __version__
from statecodec.checkpoint import document as documents
from statecodec.checkpoint import states
from statecodec.checkpoint.chain import BaseCheckpoint
from statecodec.checkpoint.digests import FileHashes, FileToHash
from statecodec.checkpoint.in_memory import MemoryCheckpoint
from statecodec.checkpoint.open import open_checkpoint
from statecodec.checkpoint.pickles import pickles, require_safe
from statecodec.checkpoint.report import Report
from statecodec.checkpoint.shared_reads import SharedReads
from statecodec.checkpoint.source import SourceCheckpoint, SourceItem
from statecodec.checkpoint.stored import StoredCheckpoint
from statecodec.choose import Rule
from statecodec.choose.budget import codes_per_octave, finer
from statecodec.choose.choices import Choices
from statecodec.choose.since_base import standing_alone
from statecodec.codecs import Change, Codec, Encoding
from statecodec.codecs.base import Companions
from statecodec.codecs.changes import subtract_parts, subtract_values
from statecodec.codecs.chunking import Chunk
from statecodec.errors import UsageError
from statecodec.format import ItemSpec
from statecodec.kernels.reference.statistics import Comparison
from statecodec.parallel import default_threads
from statecodec.progress import Progress
from statecodec.verbs.output_file import output_file
from statecodec.verbs.paths import compressed_path, named, original_name
from statecodec.verbs.processors import Processor, compared, processor
from statecodec.verbs.settings import CompressSettings
from statecodec.verbs.verify import check_against, check_intact
from statecodec.verbs.writing import Check, EncodedChunk, ErrorRules, WriteOptions, write

if TYPE_CHECKING:
    from torch import Tensor

_FAR = 2.0  # times the preset's error: worth a remark


def compress(
    src: Any,
    dst: str | Path | None = None,
    *,
    preset: str = "resume",
    rules: Sequence[str | Rule] = (),
    rules_file: str | Path | None = None,
    strict: bool = False,
    pack: str = "zstd",
    device: str = "auto",
    max_shard_size: str | int | None = "5GB",
    verify: bool = False,
    force: bool = False,
    max_step_error: float | None = None,
    max_update_error: float | None = None,
    max_weight_error: float | None = None,
    base: str | Path | None = None,
    sha256: bool = True,
    safe_only: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compress a checkpoint file, a checkpoint directory, or an object in memory.

    The first rule that matches a tensor decides its codec: `rules` come before those of `rules_file`, both before the
    preset's. Tensors that a codec would falsify (NaN, infinities, negative second moments) are kept exact and named in
    the notes. Memory is bounded whatever the size of the checkpoint, except for codecs that need a whole tensor.
    Nothing of the source is executed.

    Args:
        src: The checkpoint's path; or an object that torch.save takes. Of an object, `dst` becomes what compressing its
            torch.save file would give, but that file is never written. Its tensors are read where they are and must not
            change meanwhile.
        dst: The file to write. By default the source's name with `.sc.safetensors`, beside it; an object needs one.
        preset: `lossless`, `resume`, `small`, `tiny`, `live` or `weights`.
        rules: Rules `PATTERN=CODEC`, or Rule objects.
        rules_file: A JSON file of rules, as `analyze` writes them.
        strict: Refuse a rule that matches no tensor. Otherwise the notes name it.
        pack: `none`, `zstd` or `zstd:LEVEL`.
        device: `cpu`, `cuda`, or `auto`: the CPU unless a card is there and was measured to be faster.
        max_shard_size: Largest size of one output file, in bytes or as text such as `5GB`; None for a single file.
        verify: Read the result back and compare it with the source before it gets its name.
        force: Replace a file that is there.
        max_step_error: Largest error of weights and of moments, as a fraction of one optimizer step, in place of the
            preset's: 0.01 is 1 % of how far a step moves the weights.
        max_update_error: The same for the moments alone.
        max_weight_error: The same for the weights alone. With `base`, `residual(...)` codecs are tried as well.
        base: An earlier compressed checkpoint in the folder of `dst`. Only what changed since is stored, where that is
            smaller. The result can be restored as long as its base lies beside it.
        sha256: Compute the SHA-256 of the source's files and store it.
        safe_only: Refuse a source whose unpickling could run code.
        threads: Number of threads; by default the CPUs that this process may use.
        progress: Called with (bytes done, bytes in all, what is being done).

    Returns:
        The report: sizes, errors, notes, and in `pickles` what unpickling the source would import.

    Raises:
        UsageError: If options contradict each other, or the source is compressed already.
        PolicyError: For a preset or a rule that cannot be read.
        CodecError: For a rule's codec that does not exist or has wrong fields.
        LayoutError: If the source cannot be read as a checkpoint, or is unsafe with `safe_only`.
        FormatError: If the base cannot be read.
        OutputExists: If `dst` is there, without `force`.
        OutputFailed: If `dst` cannot be written.
        VerificationFailed: If `verify` finds a difference.

    Example:
        >>> import tempfile, torch, statecodec
        >>> checkpoint = {"model": {"w": torch.ones(256, 64)}, "step": 7}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = statecodec.compress(checkpoint, f"{folder}/ckpt.sc.safetensors", preset="lossless")
        ...     loaded = statecodec.load(f"{folder}/ckpt.sc.safetensors")
        >>> report.ratio > 1, loaded["step"], torch.equal(loaded["model"]["w"], checkpoint["model"]["w"])
        (True, 7, True)
    """
    started = time.perf_counter()
    settings = CompressSettings.of(
        preset=preset,
        rules=rules,
        rules_file=rules_file,
        strict=strict,
        pack=pack,
        max_shard_size=max_shard_size,
        max_step_error=max_step_error,
        max_update_error=max_update_error,
        max_weight_error=max_weight_error,
        sha256=sha256,
    )
    workers = threads or default_threads()
    with contextlib.ExitStack() as closing:
        if isinstance(src, str | Path):
            source = closing.enter_context(open_source(src))
            target = output_of(source, dst, force=force)
        else:
            target = output_file(dst, None, force=force)
            source = closing.enter_context(MemoryCheckpoint(src, original_name(target)))
        reports = require_safe(source) if safe_only else pickles(source)
        previous = closing.enter_context(contextlib.closing(BaseCheckpoint(base, target))) if base is not None else None
        where = processor(device, source.nbytes, workers)  # asks torch, which refusals of the rest do without
        output = settings.output(target, force, where.workers(workers), progress)
        choices = standing_alone(settings.choose(source, previous, workers, progress), previous)
        work = Compression(source, choices, previous if choices.uses_base else None, where, settings)
        report = work.write(output, check_of(source, output) if verify else None)
    notes = (*report.notes, *_price(report, settings))
    return replace(report, notes=notes, pickles=reports, seconds=time.perf_counter() - started)


def output_of(source: SourceCheckpoint, dst: str | Path | None, *, force: bool) -> Path:
    """The path that a compression of `source` is written to. Raises UsageError, OutputExists."""
    default = compressed_path(source.path)
    target = default if dst is None else Path(dst)
    if target.is_file() and target.samefile(source.path):
        raise UsageError(f"{target} is the source itself; compress it to another name")
    return output_file(dst, default, force=force)


def _price(report: Report, settings: CompressSettings) -> Iterator[str]:
    """Notes about the caller's own rules, where they change the Adam update by far more than the preset stands for."""
    step_error = choose.preset(settings.preset).step_error
    if not settings.caller_policy.rules:
        return
    u_rms = (report.total or {}).get("u_rms")
    if u_rms is None:
        if any(t.role in ("exp_avg", "exp_avg_sq") and t.codec not in ("raw", "dropped") for t in report.tensors):
            yield "with rules of your own for moments the error of the Adam update is measured by --verify only"
    elif step_error is not None and u_rms > _FAR * step_error:
        yield (
            f"the rules cost {100 * u_rms:.3g} % in the Adam update, preset {settings.preset} alone stands for "
            f"{100 * step_error:g} %"
        )
    errors = [(t.error or {}).get("relative_rms", 0.0) for t in report.tensors if t.role == "exp_avg_sq"]
    usual = 0.0 if step_error is None else 0.2 / codes_per_octave(step_error)
    if usual and max(errors, default=0.0) > _FAR * usual:
        yield (
            f"the rules put second moments off by up to {100 * max(errors):.3g} %, preset {settings.preset} alone by "
            f"about {100 * usual:.2g} %: the updates from the next step on divide by them"
        )


def open_source(src: str | Path) -> SourceCheckpoint:
    """An uncompressed checkpoint, to be compressed. Raises UsageError if it is compressed already, LayoutError."""
    checkpoint = open_checkpoint(src, crcs=False)  # all of it is read and checked beside the compression
    if isinstance(checkpoint, SourceCheckpoint):
        return checkpoint
    checkpoint.close()
    raise UsageError(f"{src} is a statecodec file already; `convert` changes its codecs, `restore` gives the original")


class StepErrors:
    """Errors over all tensors, in optimizer steps, added up as tensors are encoded."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, float]] = {}
        """Squared error and squared size, by name."""

    def add(self, name: str, error: float, size: float) -> None:
        """Add the squared error and the squared size of one tensor."""
        before = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = before[0] + error, before[1] + size

    def figures(self) -> dict[str, float] | None:
        """Relative errors by name; None if there are none."""
        errors = {name: math.sqrt(error / size) for name, (error, size) in self.sums.items() if size}
        return errors or None


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

    def write(self, output: WriteOptions, check: Check | None = None) -> Report:
        """Write the compressed checkpoint; the source's digests are taken meanwhile. Raises as `compress` does."""
        hashed = self.settings.sha256 or any(file.crcs for file in self.source.located.files)
        shared = SharedReads(self.source) if self.source.on_disk and hashed else None
        with self.hashing(self.source.own_files if shared else (), shared) as hashes:

            def document(refusals: Mapping[str, str]) -> dict[str, Any]:
                digests = hashes()
                self.source.files.check_unchanged()
                return self.document(digests, refusals)

            outcome = write(
                output,
                [self.item(i) for i in range(len(self.source.items))],
                replace(self, shared=shared).encode,
                document,
                "compressing",
                fallback=self.instead,
                check=check,
                errors=ErrorRules(self.figures, self.finer),
            )
        report = outcome.report(output)
        return replace(report, unmet=self.choices.unmet, total=report.total or self.totals.figures())

    @contextlib.contextmanager
    def hashing(
        self, files: Sequence[int], shared: SharedReads | None = None
    ) -> Iterator[Callable[[], dict[int, str]]]:
        """Hash these files of the source while the block runs; the function waits for their SHA-256."""
        located = self.source.located.files
        watched = [FileToHash(self.source.files.path(i), located[i].nbytes, located[i].crcs, i) for i in files]
        hashes = FileHashes(watched, sha256=self.settings.sha256, shared=shared)
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
        text = item.region is None
        return ItemSpec(item.name, choice.encoding, item.shape, item.dtype, attributes, choice.companions, text=text)

    def encode(self, index: int, encoding: Encoding, chunk: Chunk) -> EncodedChunk:
        """A chunk of an item of the source."""
        item, codec = self.source.items[index], encoding.codec
        x = (self.shared.read if self.shared else self.source.chunk)(item, chunk, self.processor.scratch)
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
        return EncodedChunk(*self.processor.encode(codec, x, companions))

    def instead(self, index: int) -> Codec:
        """The codec for an item whose chosen codec refused its values."""
        codec = codecs.Raw() if index in self.recoded else self.choices[self.source.items[index].name].otherwise
        self.recoded[index] = codec
        return codec

    def _companions(self, item: SourceItem, codec: Codec, chunk: Chunk) -> Companions:
        """The companions' values of the same elements: from the source, or as the reader will decode them."""
        names = self.choices[item.name].companions
        values = {}
        for role in codec.needs:
            other = self.source.items[self.source.tensors[names[role]].index]
            values[role] = self.source.chunk(other, chunk, self.processor.scratch, role)
            if codec.needs_decoded:
                chosen = self.recoded.get(other.index, self.choices[other.name].codec)
                values[role] = self.processor.decoded(chosen, values[role])
        return values

    def figures(self, index: int, c: Comparison) -> dict[str, float]:
        """The error of one tensor: of its values, or, if it is stored as a direction, of the update alone."""
        item = self.source.items[index]
        unit, relative = self.choices[item.name].unit, math.sqrt(c.sum_sq_diff / c.sum_sq) if c.sum_sq else 0.0
        if "exp_avg_sq" in self.choices[item.name].companions:
            scale = (unit or 1.0) ** 2
            self.totals.add("u_rms", c.sum_sq_diff * scale, c.sum_sq * scale)
            return {"step_error": relative}
        rms = math.sqrt(c.sum_sq_diff / max(item.numel, 1))
        figures = {"rms": rms, "relative_rms": relative, "max_abs": c.max_abs_diff}
        if unit is not None:
            figures["step_error"] = rms / unit
            if item.role in ("weight", "master"):  # those that a step trains
                self.totals.add("weight_step_error", c.sum_sq_diff / unit**2, item.numel)
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
        kept = tuple(f"{name}: kept exact: {reason}" for name, reason in refusals.items())
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
            notes=(*self.choices.notes, *kept),
            base=self.base.file if self.base else None,
            tensors=tuple(source.joined.values()),
            asked=self.settings.promised.figures,
        )
        return documents.to_json(described, source.items)


def check_of(source: SourceCheckpoint, output: WriteOptions) -> Check:
    """A check that reads a finished output back and compares it with its source."""

    def check(stored: StoredCheckpoint) -> Report:
        check_intact(stored, output.threads, output.progress)
        return check_against(stored, source, output.threads, output.progress)

    return check
