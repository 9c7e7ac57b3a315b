"""Source checkpoint -> compressed file, streamed: read a chunk, encode it, measure its error, pack it, append it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from statecodec import codecs, kernels
from statecodec._version import __version__
from statecodec.checkpoint import document as documents
from statecodec.checkpoint.chain import Base, link
from statecodec.checkpoint.digests import FileHashes, Watched
from statecodec.checkpoint.source_files import SourceFiles
from statecodec.checkpoint.stored import make_report
from statecodec.checkpoint.tensor_sets import is_compressed
from statecodec.choose import Policy, Rule, load_rules, parse_rule, preset_rules
from statecodec.choose.budgeted import Limits, Search
from statecodec.choose.fit import fitted
from statecodec.choose.plan import Plan, PlannedItem, make_plan, subject, with_codec
from statecodec.choose.rules import check_matched
from statecodec.codecs import Codec, PartSpec
from statecodec.codecs.chunking import Chunk, iterate
from statecodec.errors import BackendUnavailable, UnencodableValues, UsageError
from statecodec.format import PackedChunk, Packing, Writer
from statecodec.kernels.reference.statistics import NO_DIFFERENCE, Comparison
from statecodec.layouts import locate
from statecodec.streams import Meter, Progress, Scratch, default_threads, ordered_map
from statecodec.verbs.output_file import output_file
from statecodec.verbs.paths import compressed_path, named, parse_size
from statecodec.verbs.report import Report

_scratch = Scratch()


@dataclass(frozen=True)
class _Job:
    item: int
    chunk: Chunk


class _Refused(Exception):
    """A tensor's values do not go into the codec that was planned for it."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.name, self.reason = name, reason


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
    policy = Policy((*own.rules, *preset_rules(preset)))
    limits = Limits(max_update_error, max_weight_error)
    packing, shard_size, where = Packing.parse(pack), parse_size(max_shard_size), target_device(device)
    if is_compressed(src):
        raise UsageError(
            f"{src} is a statecodec file already; `convert` changes its codecs, `restore` gives the original"
        )
    source = locate(src)
    if dst is not None and Path(dst).is_file() and Path(dst).samefile(source.root):
        raise UsageError(f"{dst} is the source itself; compress it to another name")
    target = output_file(dst, compressed_path(source.root), force=force)
    run = partial(
        _write,
        target=target,
        packing=packing,
        shard_size=shard_size,
        force=force,
        sha256=sha256,
        preset=preset,
        policy=policy,
        device=where,
        threads=threads or default_threads(),
        progress=progress,
    )
    with contextlib.ExitStack() as closing:
        previous = None
        if base is not None:
            previous = closing.enter_context(contextlib.closing(Base(base, target)))
        plan = make_plan(source, policy)
        subjects = (subject(p.region, p.item.name) for p in plan.items if p.region is not None)
        unmatched = check_matched(own, subjects, strict=strict)
        chosen, notes = fitted(plan, own)
        if limits:
            search = Search(plan, own, limits, packing, threads or default_threads(), progress, previous)
            chosen, notes = search.codecs()
        plan, notes = make_plan(source, policy, chosen=chosen), (*unmatched, *notes)
        try:
            report = run(plan, notes, previous)
        except _Refused:
            refusals = _find_refusals(plan, where, previous, threads or default_threads(), progress)
            plan = make_plan(source, policy, refusals, chosen)
            kept = tuple(f"{name}: kept exact: {reason}" for name, reason in refusals.items())
            report = run(plan, (*notes, *kept), previous)
    if verify or limits:
        report = _verified(target, source.root, report, limits, progress)
    return replace(report, seconds=time.perf_counter() - started)


def _write(
    plan: Plan,
    notes: tuple[str, ...],
    base: Base | None,
    *,
    target: Path,
    packing: Packing,
    shard_size: int | None,
    force: bool,
    sha256: bool,
    preset: str,
    policy: Policy,
    device: torch.device,
    threads: int,
    progress: Progress | None,
) -> Report:
    source = plan.source
    files = SourceFiles(source)
    plan, base, remarks = _linked(plan, base, files, packing)
    own = [i for i, f in enumerate(source.files) if f.same_as is None]
    hashes = FileHashes(
        [Watched(files.path(i), source.files[i].nbytes, source.files[i].crcs) for i in own], sha256=sha256
    )
    meter = Meter(progress, plan.nbytes, "compressing")
    hashes.start()
    try:
        stored = [p.item for p in plan.items]
        with Writer(target, stored, packing=packing, max_shard_size=shard_size, force=force) as writer:
            errors = _ErrorSums(plan)
            encode = partial(_encode, plan, files, writer, device, base)
            with contextlib.closing(ordered_map(encode, _jobs(plan), threads)) as encoded:
                for job, packed, comparison in encoded:
                    writer.append(packed)
                    errors.add(job.item, comparison)
                    meter.add((job.chunk.stop - job.chunk.start) * plan.items[job.item].item.dtype.itemsize)
            for index, error in errors.results():
                writer.set_attributes(index, {**plan.items[index].item.attributes, "error": error})
            found = dict(zip(own, hashes.digests(), strict=False))
            files.check_unchanged()
            digests = [found.get(i) for i in range(len(source.files))]
            document = _document(plan, (*notes, *remarks), preset, policy, digests, base)
            written = writer.close(documents.to_json(document))
        shown = target.with_name(written.path.name) if len(written.files) > 1 else target  # what a reader opens
        return make_report(shown, written.version, document, written.items, written.files)
    finally:
        hashes.cancel()


def _linked(
    plan: Plan, base: Base | None, files: SourceFiles, packing: Packing
) -> tuple[Plan, Base | None, tuple[str, ...]]:
    """The plan with changes where they are smaller, and the base if any are; else a file of its own, and why."""
    if base is None:
        residual = next((p.item.name for p in plan.items if isinstance(p.item.codec, codecs.Based)), None)
        if residual is not None:
            raise UsageError(f"{residual}: this codec stores what changed since a base checkpoint; give one (--base)")
        return plan, None, ()
    linked = link(plan, base, files, packing)
    if linked.used:
        return linked.plan, base, ()
    return plan, None, (f"nothing is smaller as a change since {base.file.name}: this file stands alone",)


def _jobs(plan: Plan) -> Iterator[_Job]:
    for index, planned in enumerate(plan.items):
        item = planned.item
        for chunk in iterate(item.codec, item.shape, item.dtype):
            yield _Job(index, chunk)


def _encode(
    plan: Plan, files: SourceFiles, writer: Writer, device: torch.device, base: Base | None, job: _Job
) -> tuple[_Job, PackedChunk, Comparison | None]:
    planned = plan.items[job.item]
    x = files.read(plan, planned, job.chunk, _scratch)
    parts, comparison = _encode_chunk(planned, x, device, base, job.chunk)
    return job, writer.pack(job.item, job.chunk, parts), comparison


def _encode_chunk(
    planned: PlannedItem, x: Tensor, device: torch.device, base: Base | None, chunk: Chunk
) -> tuple[dict[str, Tensor], Comparison | None]:
    codec = planned.item.codec
    if isinstance(codec, codecs.Raw):
        return {"data": x}, None
    if isinstance(codec, codecs.Delta) and base is not None:
        parts, comparison = _encode_chunk(with_codec(planned, codec.inner), x, device, None, chunk)
        return codec.difference(parts, base.parts(planned, chunk)), comparison
    try:
        if isinstance(codec, codecs.Residual) and base is not None:
            parts, decoded = codec.encode_from(x, base.values(planned, chunk))
        else:
            parts, decoded = _there_and_back(codec, x, device)
    except UnencodableValues as error:
        raise _Refused(planned.item.name, str(error)) from error
    if x.dtype not in (torch.float32, torch.float64):
        x, decoded = x.to(torch.float32), decoded.to(torch.float32)
    comparison = kernels.host().compare(x.view(-1), decoded.view(-1))
    return {name: part.to("cpu") for name, part in parts.items()}, comparison


def _there_and_back(codec: Codec, x: Tensor, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """Encoded parts, and what they decode to; on the CPU in scratch memory, good until the thread's next chunk."""
    if device.type != "cpu":
        encoded = codec.encode(x.to(device))
        return dict(encoded.parts), encoded.decode().to("cpu")
    specs = codec.parts(tuple(x.shape), x.dtype)
    parts = {name: _scratch.take(name, spec) for name, spec in specs.items()}
    decoded = _scratch.take("decoded", PartSpec(x.dtype, tuple(x.shape)))
    codec.encode_into(x, parts, kernels.host())
    codec.decode_into(parts, decoded, kernels.host())
    return parts, decoded


def _find_refusals(
    plan: Plan, device: torch.device, base: Base | None, threads: int, progress: Progress | None
) -> dict[str, str]:
    """Every item that its codec refuses, with the reason: one pass over all lossy items."""
    refusals: dict[str, str] = {}
    meter = Meter(progress, plan.nbytes, "looking for values that cannot be encoded")

    def attempt(job: _Job) -> tuple[_Job, _Refused | None]:
        planned = plan.items[job.item]
        try:
            if planned.lossy and planned.item.name not in refusals:
                _encode_chunk(planned, files.read(plan, planned, job.chunk), device, base, job.chunk)
        except _Refused as refused:
            return job, refused
        return job, None

    files = SourceFiles(plan.source)
    with contextlib.closing(ordered_map(attempt, _jobs(plan), threads)) as attempts:
        for job, refused in attempts:
            if refused is not None:
                refusals.setdefault(refused.name, refused.reason)
            meter.add((job.chunk.stop - job.chunk.start) * plan.items[job.item].item.dtype.itemsize)
    return refusals


class _ErrorSums:
    """Adds the chunks' error sums up per item."""

    def __init__(self, plan: Plan) -> None:
        self._numel = [math.prod(p.item.shape) for p in plan.items]
        self._sums: dict[int, Comparison] = {}

    def add(self, item: int, c: Comparison | None) -> None:
        if c is not None:
            self._sums[item] = self._sums.get(item, NO_DIFFERENCE).merged(c)

    def results(self) -> Iterator[tuple[int, dict[str, float]]]:
        for item, c in self._sums.items():
            relative = math.sqrt(c.sum_sq_diff / c.sum_sq) if c.sum_sq else 0.0
            rms = math.sqrt(c.sum_sq_diff / max(self._numel[item], 1))
            figures = {"rms": rms, "relative_rms": relative, "max_abs": c.max_abs_diff}
            yield item, {name: value for name, value in figures.items() if math.isfinite(value)}  # fp64 may overflow


def _document(
    plan: Plan, notes: tuple[str, ...], preset: str, policy: Policy, digests: Sequence[str | None], base: Base | None
) -> documents.Document:
    source = plan.source
    single = None if source.is_directory else source.files[0]
    return documents.Document(
        created_by=f"statecodec {__version__}",
        preset=preset,
        rules=tuple(str(rule) for rule in policy.rules),
        source={
            "name": named(source.root).name,
            "layout": "directory" if single is None else single.layout,
            "bytes": plan.nbytes,
            "sha256": None if single is None else digests[0],
        },
        files=plan.stored_files(digests),
        directories=source.directories,
        notes=(*plan.notes, *notes),
        base=base.file if base else None,
    )


def _verified(target: Path, root: Path, report: Report, limits: Limits, progress: Progress | None) -> Report:
    from statecodec.verbs.verify import verify

    try:
        checked = verify(target, against=root, progress=progress)
        limits.check(checked.total or {})
    except BaseException:
        for name in (*report.files, report.path):
            Path(name).unlink(missing_ok=True)
        raise
    return replace(report, updates=checked.updates, total=checked.total)


def _rule(rule: str | Rule) -> Rule:
    return parse_rule(rule) if isinstance(rule, str) else rule


def target_device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device {name!r}: expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable("device cuda was asked for, but torch sees no CUDA device here; use --device cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")
