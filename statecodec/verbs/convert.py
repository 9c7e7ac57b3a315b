"""`convert`: between codecs, between optimizers, and between layouts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from statecodec.checkpoint.open import open_checkpoint
from statecodec.checkpoint.pickles import safe_pickles
from statecodec.checkpoint.report import Report
from statecodec.choose import Rule
from statecodec.errors import UsageError
from statecodec.operations import LAYOUTS
from statecodec.progress import Progress
from statecodec.verbs.convert_layout import convert_layout
from statecodec.verbs.convert_target import Target
from statecodec.verbs.output_file import output_file
from statecodec.verbs.recode import convert_codecs


def convert(
    src: str | Path,
    dst: str | Path,
    to: str | Rule | Sequence[str | Rule] = (),
    *,
    layout: str | None = None,
    pack: str = "auto",
    strict: bool = False,
    force: bool = False,
    safe_only: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Convert a checkpoint, compressed or not, and report what that lost.

    There are three kinds of conversion. Rules (`exp_avg_sq=shared(dims=[1])`) give the tensors that they name another
    codec; all others stay as they are, and `dst` is a compressed file. One optimizer (`foam(level=2)`,
    `slimadam(rules=rules.json)`, `torch`) turns the optimizer's state into one from which that class resumes; `dst` is
    a compressed file if it ends in .safetensors, else a torch.save file. A layout writes the same values as files of
    another framework.

    Large tensors of a conversion to an optimizer or a layout wait on disk in the folder of `dst`, so memory is that of
    a few tensors.

    Args:
        src: The checkpoint, compressed or not.
        dst: The file or folder to write.
        to: One or more rules `PATTERN=CODEC`, or one optimizer: `torch`, `adamw`, `foam`, `slimadam` or `lorapre`, with
            constructor options in parentheses.
        layout: In place of `to`: `torch` (one torch.save file), `safetensors` (a safetensors file of all tensors, and
            beside it a JSON file of all other values), `dcp` (a folder of torch.distributed.checkpoint), or `zero-fp32`
            (one torch.save file of the fp32 parameters by name of a DeepSpeed ZeRO directory, as its zero_to_fp32.py
            makes it).
        pack: As for `compress`, of a compressed `dst`.
        strict: Refuse a rule that matches no tensor, and values that the layout cannot hold, such as objects of unknown
            classes. Otherwise the notes name them.
        force: Replace a file that is there.
        safe_only: Refuse a checkpoint whose unpickling could run code.
        threads: Number of threads; by default the CPUs that this process may use.
        progress: Called with (bytes done, bytes in all, what is being done).

    Returns:
        The report of the written file, with the errors made.

    Raises:
        UsageError: Unless exactly one of `to` and `layout` is given, or if the checkpoint has nothing to convert.
        PolicyError: For a rule that cannot be read.
        CodecError: For a codec that does not exist or has wrong fields.
        OptimizerError: For options or states that the optimizer does not take.
        LayoutError: If an uncompressed source cannot be read, or is unsafe with `safe_only`.
        FormatError: If a compressed source cannot be read.
        OutputExists: If `dst` is there, without `force`.
        OutputFailed: If `dst` cannot be written.

    Example:
        >>> import tempfile, torch, statecodec
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"w": torch.arange(6.0), "step": 7}, f"{folder}/ckpt.pt")
        ...     _ = statecodec.convert(f"{folder}/ckpt.pt", f"{folder}/ckpt.safetensors", layout="safetensors")
        ...     statecodec.load(f"{folder}/ckpt.safetensors")["w"].tolist()
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    """
    codecs_or_targets = [to] if isinstance(to, str | Rule) else list(to)
    if codecs_or_targets and layout is not None:
        raise UsageError("convert to a layout, or by rules or to an optimizer (to), not both at once")
    if not codecs_or_targets and layout is None:
        raise UsageError("convert needs to be told to what: rules or one optimizer (to), or a layout")
    if layout is not None and layout not in LAYOUTS:
        raise UsageError(f"layout {layout!r:.40}: expected {', '.join(LAYOUTS)}")
    if safe_only:
        with open_checkpoint(src, crcs=False) as checkpoint:
            safe_pickles(checkpoint)
    if layout is not None:
        return convert_layout(Path(src), Path(dst), layout, strict=strict, force=force, progress=progress)
    targets = [Target.parse(t) if isinstance(t, str) else None for t in codecs_or_targets]
    if not any(targets):
        return convert_codecs(
            src, dst, codecs_or_targets, pack=pack, strict=strict, force=force, threads=threads, progress=progress
        )
    if len(codecs_or_targets) > 1 or targets[0] is None:
        raise UsageError("convert to an optimizer, or by rules, not both at once; convert the result again")
    target = output_file(dst, None, force=force)
    from statecodec.verbs.convert_optimizers import convert_optimizers  # imports torch: only once it is needed

    return convert_optimizers(Path(src), target, targets[0], pack, force, progress)
