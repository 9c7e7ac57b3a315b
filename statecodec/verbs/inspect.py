"""What is in a checkpoint, compressed or not, without running anything in it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from statecodec.checkpoint.stored import report_of
from statecodec.checkpoint.tensor_sets import is_compressed
from statecodec.choose import Policy
from statecodec.choose.plan import make_plan
from statecodec.layouts import locate
from statecodec.verbs.report import Report, TensorReport


def inspect(src: str | Path) -> Report:
    """The tensors of a checkpoint with their roles, shapes, codecs and bytes; reads headers only.

    Of an uncompressed checkpoint every codec is `raw` and `source.sha256` is None, as that would need all of it read.
    Raises FormatError or LayoutError.
    """
    started = time.perf_counter()
    if is_compressed(src):
        return report_of(src, time.perf_counter() - started)
    source = locate(src)
    plan = make_plan(source, Policy(()))
    tensors = tuple(
        TensorReport(
            name=p.item.name,
            role=str(p.item.attributes["role"]),
            param=p.item.attributes.get("param"),
            shape=p.item.shape,
            dtype=str(p.item.dtype).removeprefix("torch."),
            codec="raw",
            bytes_before=size,
            bytes_after=size,
        )
        for p in plan.items
        for size in (p.region.nbytes if p.region else p.item.shape[0],)
    )
    layout = "directory" if source.is_directory else source.files[0].layout
    report = Report(
        path=str(src),
        format_version=None,
        bytes=plan.nbytes,
        tensors=tensors,
        seconds=0.0,
        notes=plan.notes,
        source={"name": source.root.name, "layout": layout, "bytes": plan.nbytes, "sha256": None},
        files=tuple(f.path for f in source.files),
    )
    return replace(report, seconds=time.perf_counter() - started)
