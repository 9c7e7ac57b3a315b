"""Source checkpoint -> compressed file: choose a codec for every tensor, then write, streamed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statecodec import codecs, kernels
from statecodec._version import __version__
from statecodec.buffers import Scratch
from statecodec.checkpoint import document as documents
from statecodec.checkpoint.chain import Base
from statecodec.checkpoint.digests import FileHashes, Watched
from statecodec.checkpoint.open import open_checkpoint
from statecodec.checkpoint.report import Report
from statecodec.checkpoint.source import SourceCheckpoint
from statecodec.checkpoint.stored import Stored
from statecodec.choose import Policy, Rule, load_rules, parse_rule, preset_rules
from statecodec.choose.budgeted import Limits, Search
from statecodec.choose.choices import Choices, by_rules
from statecodec.choose.fit import fitted
from statecodec.choose.since_base import linked
from statecodec.codecs import Codec
from statecodec.codecs.chunking import Chunk
from statecodec.errors import BackendUnavailable, UsageError
from statecodec.format import Item, Packing
from statecodec.kernels.reference.statistics import Comparison
from statecodec.parallel import default_threads
from statecodec.progress import Progress
from statecodec.verbs.output_file import output_file
from statecodec.verbs.paths import compressed_path, named, parse_size
from statecodec.verbs.verify import check_against, check_intact
from statecodec.verbs.writing import Check, Encoded, Output, write

_scratch = Scratch()


def compress(
    src: str | Path,
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
    max_update_error: float | None = None,
    max_weight_error: float | None = None,
    base: str | Path | None = None,
    sha256: bool = True,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compress a checkpoint file or directory into `dst` (by default SRC's name with `.sc.safetensors`, beside it).

    `rules` ("PATTERN=CODEC") go before those of `rules_file`, and both before the preset's; the first that matches a
    tensor decides. A rule that matches no tensor is named in the report's notes, or refused with `strict`. Tensors that
    a codec would falsify (NaN, infinities, negative second moments) are kept exact and named in the notes. `verify`
    reads the result back and compares it with the source before returning. Memory is bounded whatever the size of the
    checkpoint (codecs that need a whole tensor excepted). Nothing of the source is ever executed.

    `max_update_error` chooses the moments' codecs: the smallest whose relative rms error of the Adam updates, over all
    parameters, is at most that; `max_weight_error` likewise the weights' by the relative rms error of their values. The
    preset decides what neither does, and your own rules go before both. The result is verified.

    `base`, an earlier compressed checkpoint in the folder of `dst`, makes this one a link of a chain: it stores what
    changed, where that is smaller, and restores to what it would without, as long as its base lies beside it. Only with
    a base are `residual(...)` codecs possible; `max_weight_error` considers them by itself.

    Raises UsageError, PolicyError, CodecError, LayoutError, OutputExists, FormatError, OSError.
    """
    started = time.perf_counter()
    own = Policy((*(_rule(r) for r in rules), *(load_rules(rules_file) if rules_file else ())))
    limits, where = Limits(max_update_error, max_weight_error), target_device(device)
    packing, shard_size, workers = Packing.parse(pack), parse_size(max_shard_size), threads or default_threads()
    with contextlib.ExitStack() as closing:
        source = closing.enter_context(open_source(src))
        if dst is not None and Path(dst).is_file() and Path(dst).samefile(source.path):
            raise UsageError(f"{dst} is the source itself; compress it to another name")
        target = output_file(dst, compressed_path(source.path), force=force)
        previous = None
        if base is not None:
            previous = closing.enter_context(contextlib.closing(Base(base, target)))
        choices = fitted(source, by_rules(source, own, preset, strict=strict))
        if limits:
            choices = Search(source, choices, limits, packing, workers, progress, previous).refined()
        choices = linked(source, choices, previous, packing)
        policy = Policy((*own.rules, *preset_rules(preset)))
        work = Compression(source, choices, previous if choices.uses_base else None, where, preset, policy, sha256)
        output = Output(target, packing, shard_size, force, workers, progress)
        report = work.write(output, _check(work.source, output, limits) if verify or limits else None)
    return replace(report, seconds=time.perf_counter() - started)


def open_source(src: str | Path) -> SourceCheckpoint:
    """An uncompressed checkpoint, to be compressed. Raises UsageError if it is compressed already, LayoutError."""
    checkpoint = open_checkpoint(src, crcs=False)  # all of it is read and checked beside the compression
    if isinstance(checkpoint, SourceCheckpoint):
        return checkpoint
    checkpoint.close()
    raise UsageError(f"{src} is a statecodec file already; `convert` changes its codecs, `restore` gives the original")


@dataclass(frozen=True)
class Compression:
    """A source with its choices: makes the chunks to be written, and the document that says what they are of."""

    source: SourceCheckpoint
    choices: Choices
    base: Base | None
    device: torch.device
    preset: str | None
    rules: Policy
    sha256: bool = True

    def write(self, output: Output, check: Check | None = None) -> Report:
        """Write the compressed checkpoint; the source's digests are taken meanwhile. Raises as `compress` does."""
        located = self.source.located
        own = [i for i, f in enumerate(located.files) if f.same_as is None]
        watched = [Watched(self.source.files.path(i), located.files[i].nbytes, located.files[i].crcs) for i in own]
        hashes = FileHashes(watched, sha256=self.sha256)

        def document(refusals: Mapping[str, str]) -> dict[str, Any]:
            found = dict(zip(own, hashes.digests(), strict=False))
            self.source.files.check_unchanged()
            written = self._document([found.get(i) for i in range(len(located.files))], refusals)
            return documents.to_json(written, self.source.items)

        hashes.start()
        try:
            outcome = write(output, list(self._items()), self._encode, document, "compressing", check=check)
        finally:
            hashes.cancel()
        return replace(outcome.report(output), unmet=self.choices.unmet)

    def _items(self) -> Iterator[Item]:
        for item in self.source.items:
            attributes = {"role": item.role, **({"param": item.param} if item.region is not None else {})}
            text = item.region is None
            yield Item(item.name, self.choices[item.name].codec, item.shape, item.dtype, attributes, text=text)

    def _encode(self, index: int, codec: Codec, chunk: Chunk) -> Encoded:
        item = self.source.items[index]
        x = self.source.chunk(item, chunk, _scratch)
        if isinstance(codec, codecs.Delta) and self.base is not None:
            inner = self._encoded(codec.inner, x)
            return replace(inner, parts=codec.difference(inner.parts, self.base.parts(item, chunk)))
        if isinstance(codec, codecs.Residual) and self.base is not None:
            parts, decoded = codec.encode_from(x, self.base.values(item, chunk))
            return Encoded(parts, _compared(x, decoded))
        return self._encoded(codec, x)

    def _encoded(self, codec: Codec, x: Tensor) -> Encoded:
        if isinstance(codec, codecs.Raw):
            return Encoded({"data": x})
        parts, decoded = _there_and_back(codec, x, self.device)
        return Encoded({name: part.to("cpu") for name, part in parts.items()}, _compared(x, decoded))

    def _document(self, digests: Sequence[str | None], refusals: Mapping[str, str]) -> documents.Document:
        source, located = self.source, self.source.located
        kept = tuple(f"{name}: kept exact: {reason}" for name, reason in refusals.items())
        return documents.Document(
            created_by=f"statecodec {__version__}",
            preset=self.preset,
            rules=tuple(str(rule) for rule in self.rules.rules),
            source={
                "name": named(source.path).name,
                "layout": source.layout,
                "bytes": source.nbytes,
                "sha256": None if located.is_directory else digests[0],
            },
            files=source.stored_files(digests),
            folders=located.folders,
            notes=(*self.choices.notes, *kept),
            base=self.base.file if self.base else None,
        )


def _there_and_back(codec: Codec, x: Tensor, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """Encoded parts, and what they decode to; on the CPU in scratch memory, good until the thread's next chunk."""
    if device.type != "cpu":
        encoded = codec.encode(x.to(device))
        return dict(encoded.parts), encoded.decode().to("cpu")
    specs = codec.parts(tuple(x.shape), x.dtype)
    parts = {name: _scratch.take("part", s.dtype, s.shape, name) for name, s in specs.items()}
    decoded = _scratch.take("decoded", x.dtype, tuple(x.shape))
    codec.encode_into(x, parts, kernels.host())
    codec.decode_into(parts, decoded, kernels.host())
    return parts, decoded


def _compared(x: Tensor, decoded: Tensor) -> Comparison:
    if x.dtype not in (torch.float32, torch.float64):
        x, decoded = x.to(torch.float32), decoded.to(torch.float32)
    return kernels.host().compare(x.view(-1), decoded.reshape(-1))


def _check(source: SourceCheckpoint, output: Output, limits: Limits) -> Check:
    """Read a finished output back, and hold it against its source and the budgets."""

    def check(stored: Stored) -> Report:
        check_intact(stored, output.threads, output.progress)
        report = check_against(stored, source, output.threads, output.progress)
        limits.check(report.total or {})
        return report

    return check


def _rule(rule: str | Rule) -> Rule:
    return parse_rule(rule) if isinstance(rule, str) else rule


def target_device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device {name!r}: expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable("device cuda was asked for, but torch sees no CUDA device here; use --device cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")
