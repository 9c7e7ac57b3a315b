"""`convert`: between codecs, between optimizers, and between layouts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from statecodec.checkpoint.open import open_checkpoint
from statecodec.checkpoint.pickles import require_safe
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
    pack: str = "zstd",
    strict: bool = False,
    force: bool = False,
    safe_only: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Convert a checkpoint, compressed or not, and report what that lost.

    `to` is one or more rules (`exp_avg_sq=shared(dims=[1])`): the tensors they name get that codec, all others stay as
    they are; `dst` is a compressed file. A rule that matches no tensor is noted, or refused with `strict`.

    Or it is one optimizer (`foam(level=2)`, see Target): the optimizer's state becomes one that this class resumes
    from, `torch` the dense state of torch.optim. Then `dst` ending in .safetensors is a compressed file, anything else
    a torch.save file. Large tensors wait on disk in its folder, so that the memory it takes is that of a few tensors.

    Or, with `layout` instead of `to`, the same values go into the files of another framework: `torch` one torch.save
    file, `safetensors` a safetensors file of all tensors and beside it a JSON file of all other values, `dcp` a folder
    of torch.distributed.checkpoint, `zero-fp32` one torch.save file of what DeepSpeed's zero_to_fp32.py makes of a
    ZeRO directory: the fp32 parameters by name. What such files cannot hold (objects of unknown classes) is left out
    and named in the notes, or refused with `strict`.

    With `safe_only` a checkpoint whose unpickling could run code is refused.

    Raises UsageError, PolicyError, CodecError, OptimizerError, OutputExists, LayoutError, FormatError.
    """
    codecs_or_targets = [to] if isinstance(to, str | Rule) else list(to)
    if bool(codecs_or_targets) == (layout is not None):
        raise UsageError("convert needs to be told to what: rules or one optimizer (to), or a layout")
    if layout is not None and layout not in LAYOUTS:
        raise UsageError(f"layout {layout!r:.40}: expected {', '.join(LAYOUTS)}")
    if safe_only:
        with open_checkpoint(src, crcs=False) as checkpoint:
            require_safe(checkpoint)
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
    from statecodec.verbs.convert_optimizers import convert_optimizers  # classes of torch's: only once there is work

    return convert_optimizers(Path(src), target, targets[0], pack, force, progress)
