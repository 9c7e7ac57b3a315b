"""Source checkpoint -> compressed file: choose a codec for every tensor, then write, streamed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from statecodec import choose
from statecodec.checkpoint.chain import BaseCheckpoint
from statecodec.checkpoint.in_memory import MemoryCheckpoint
from statecodec.checkpoint.open import open_checkpoint
from statecodec.checkpoint.pickles import pickles, safe_pickles
from statecodec.checkpoint.report import Report
from statecodec.checkpoint.source import SourceCheckpoint
from statecodec.choose import Rule
from statecodec.choose.budget import codes_per_octave
from statecodec.choose.since_base import standing_alone
from statecodec.errors import UsageError
from statecodec.figures import percent
from statecodec.parallel import default_threads
from statecodec.progress import Progress
from statecodec.verbs.compression import Compression, verification_of
from statecodec.verbs.output_file import output_file
from statecodec.verbs.paths import compressed_path, original_name
from statecodec.verbs.processors import processor
from statecodec.verbs.settings import CompressSettings

_FAR = 2.0  # errors above this multiple of the preset's get a note


def compress(
    src: Any,
    dst: str | Path | None = None,
    *,
    preset: str = "resume",
    rules: Sequence[str | Rule] = (),
    rules_file: str | Path | None = None,
    strict: bool = False,
    pack: str = "auto",
    device: str = "auto",
    max_shard_size: str | int | None = "5GB",
    verify: bool = False,
    force: bool = False,
    max_step_error: float | None = None,
    max_update_error: float | None = None,
    max_weight_error: float | None = None,
    base: str | Path | None = None,
    sha256: bool | None = None,
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
        pack: `none`; `zstd`; `predicted`, which is smaller and takes longer; `auto`, which is `predicted` for
            moments in 16 bits and for momenta, and `zstd` for the rest. All but `none` take a `:LEVEL`.
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
        sha256: Store the SHA-256 of the source's files. By default where it proves something later: with `lossless`, or
            with other settings that store everything exactly. It takes more time than anything else.
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
        BackendUnavailable: For the device `cuda` without a card.
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
        reports = safe_pickles(source) if safe_only else pickles(source)
        previous = closing.enter_context(contextlib.closing(BaseCheckpoint(base, target))) if base is not None else None
        where = processor(device, source.nbytes, workers)  # imports torch, so it comes after the other refusals
        output = settings.output(target, force, where.workers(workers), progress)
        choices = standing_alone(settings.choose(source, previous, workers, progress), previous)
        work = Compression(source, choices, previous if choices.uses_base else None, where, settings)
        report = work.write(output, verification_of(source, output) if verify else None)
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
    most = choose.preset(settings.preset).budget.moments
    if not settings.caller_policy.rules:
        return
    u_rms = (report.total or {}).get("u_rms")
    if u_rms is None:
        if any(t.role in ("exp_avg", "exp_avg_sq") and t.codec not in ("raw", "dropped") for t in report.tensors):
            yield "with rules of your own for moments the error of the Adam update is measured by --verify only"
    elif most is not None and u_rms > _FAR * most:
        yield (
            f"the rules put the Adam update off by {percent(u_rms)} of a step, preset {settings.preset} alone stands "
            f"for {percent(most)}"
        )
    errors = [(t.error or {}).get("relative_rms", 0.0) for t in report.tensors if t.role == "exp_avg_sq"]
    usual = 0.0 if most is None else 0.2 / codes_per_octave(most)
    if usual and max(errors, default=0.0) > _FAR * usual:
        yield (
            f"the rules put second moments off by up to {100 * max(errors):.3g} %, preset {settings.preset} alone by "
            f"about {100 * usual:.2g} %: the updates from the next step on divide by them"
        )


def open_source(src: str | Path) -> SourceCheckpoint:
    """An uncompressed checkpoint, to be compressed. Raises UsageError if it is compressed already, LayoutError."""
    checkpoint = open_checkpoint(src, crcs=False)  # CRCs are checked while the file is hashed
    if isinstance(checkpoint, SourceCheckpoint):
        return checkpoint
    checkpoint.close()
    raise UsageError(f"{src} is a statecodec file already; `convert` changes its codecs, `restore` gives the original")
