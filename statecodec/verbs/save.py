"""`save`: nested Python values straight into a compressed file, losslessly."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from statecodec import codecs
from statecodec._version import __version__
from statecodec.checkpoint.document import Document, to_json
from statecodec.checkpoint.nested import TREE, CollectedItems
from statecodec.checkpoint.nested import to_json as nested_json
from statecodec.checkpoint.report import Report
from statecodec.checkpoint.stored_report import stored_report
from statecodec.codecs import EncodedTensor, Encoding
from statecodec.codecs.chunking import iterate
from statecodec.dtypes import UINT8
from statecodec.format import ItemSpec, Packing, Writer
from statecodec.lazy import torch
from statecodec.progress import Meter, Progress
from statecodec.verbs.output_file import output_file
from statecodec.verbs.paths import original_name

if TYPE_CHECKING:
    from torch import Tensor


def save(
    obj: Any, path: str | Path, *, pack: str = "auto", force: bool = False, progress: Progress | None = None
) -> Report:
    """Save nested dicts, lists and tuples of tensors and plain values as a compressed checkpoint, losslessly.

    Encoded tensors (EncodedTensor, or their plain form as in an optimizer's state_dict()) are stored as they are,
    nothing is decoded. Tensors sharing a storage share it again after `load`. Values may be dict, OrderedDict, list,
    tuple, None, bool, int, float, complex, str, bytes, torch.dtype, torch.Size, torch.device, of exactly these types:
    what would come back as something else (named tuples, defaultdicts, numpy's numbers) is refused by its key path, as
    are tensors without plain memory (meta, nested, sparse, quantized, subclasses).

    Args:
        obj: The value.
        path: The file to write.
        pack: As for `compress`. `auto` is `zstd` here.
        force: Replace a file that is there.
        progress: Called with (bytes done, bytes in all, what is being done).

    Returns:
        The report of the file.

    Raises:
        UsageError: For a value that cannot be saved, or a path that is no file's.
        OutputExists: If the file is there, without `force`.
        OutputFailed: If it cannot be written.

    Example:
        >>> import tempfile, torch, statecodec
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = statecodec.save({"w": torch.arange(3), "step": 7}, f"{folder}/state.safetensors")
        ...     statecodec.load(f"{folder}/state.safetensors")
        {'w': tensor([0, 1, 2]), 'step': 7}
    """
    target, collected = output_file(path, None, force=force), CollectedItems()
    tree = nested_json(obj, collected)
    size = sum(math.prod(t.shape) * t.dtype.itemsize for t in collected.tensors)
    text = torch.frombuffer(bytearray(json.dumps(tree).encode()), dtype=torch.uint8)
    skeleton: dict[str, Any] = {"role": "skeleton"}
    collected.items.append(ItemSpec(TREE, Encoding(codecs.Raw()), tuple(text.shape), UINT8, skeleton, text=True))
    collected.tensors.append(text)
    source = {"name": original_name(target), "layout": "native", "bytes": size, "sha256": None}
    document = Document(f"statecodec {__version__}", None, (), source, (), (), ())
    meter = Meter(progress, sum(t.nbytes for t in collected.tensors), "saving")
    with Writer(target, collected.items, packing=Packing.parse(pack), max_shard_size=None, force=force) as writer:
        for index, tensor in enumerate(collected.tensors):
            for chunk, parts in _chunks(collected.items[index], tensor):
                writer.append(writer.pack(index, chunk, parts))
                meter.add(sum(part.nbytes for part in parts.values()))
        written = writer.close(to_json(document))
    report = stored_report(target, written.version, document, written.items, written.files)
    return replace(report, notes=(*report.notes, *written.notes))


def _chunks(item: ItemSpec, tensor: Tensor | EncodedTensor) -> Iterator[tuple[Any, dict[str, Tensor]]]:
    """Chunks of an item with their parts: slices of what is there, nothing is encoded."""
    encoded = (
        tensor
        if isinstance(tensor, EncodedTensor)
        else EncodedTensor(item.encoding.codec, item.shape, item.dtype.torch, {"data": tensor})
    )
    flat = {name: part.reshape(-1) for name, part in encoded.parts.items()}
    position = dict.fromkeys(flat, 0)
    for chunk in iterate(item.encoding.codec, item.shape, item.dtype):
        parts = {}
        for name, spec in item.encoding.parts(chunk.shape, item.dtype).items():
            parts[name] = flat[name][position[name] : position[name] + spec.numel].view(spec.shape).to("cpu")
            position[name] += spec.numel
        yield chunk, parts
