"""Names the framework that wrote a checkpoint, by traces that only that framework leaves.

There are three kinds of traces: keys of the object in a file, files that lie together in a folder, and states that an
optimizer keeps in a form of its own. Where there is none, no framework is named. A layout that reads one framework's
files names it itself, in `Located.framework`.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from statecodec.layouts.base import LogicalTensor
from statecodec.layouts.facts.local_shards import local_shard
from statecodec.layouts.listing import ListedFile, Listing
from statecodec.layouts.pickle.nodes import DictNode
from statecodec.layouts.protocol import Facts, Located

_MOST: Final = 8
"""Frameworks that are named. A folder of many checkpoints, or a hostile one, has no end of them."""
_VERSION: Final = re.compile(r"\d[0-9A-Za-z.+]{0,19}")
_RANDOM_STATES: Final = re.compile(r"random_states_\d+\.pkl")
_FLAT: Final = re.compile(r"(.*\.)?_?flat_param(_\d+)?")
_OPTIMIZERS: Final = {"bitsandbytes": "bitsandbytes", "torchao": "torchao", "flashoptim": "FlashOptim"}
_KEYS: Final = {
    "nanoGPT": {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"},
    "torchtitan": {"train_state", "lr_scheduler", "dataloader"},
    "torchtune": {"seed", "epochs_run", "total_epochs", "max_steps_per_epoch"},
}
"""Keys that stand together at the top of one object."""
_FOLDERS: Final[dict[str, Sequence[tuple[str, bytes]]]] = {
    "transformers Trainer": [(r"trainer_state\.json", rb'"global_step":')],
    "FSDP, full state dict": [(r"pytorch_model_fsdp(_\d+)?\.bin", rb"^PK")],
    "FSDP, sharded state dict": [(r"pytorch_model_fsdp(_\d+)?/\.metadata", rb"^\x80")],
    "Megatron distributed checkpoint": [
        (r"\.metadata", rb"^\x80"), (r"common\.pt", rb"^PK"), (r"metadata\.json", rb'"sharded_backend":'),
    ],
    "nanochat": [(r"model_\d+\.pt", rb"^PK"), (r"meta_\d+\.json", rb'"model_config":')],
}  # fmt: skip
"""Files that stand together in one folder: what their names match, and what is among their first bytes."""


def frameworks(parts: Iterable[Located], tensors: Iterable[LogicalTensor], listing: Listing) -> str | None:
    """What wrote a checkpoint and its optimizer states, as reports say it; None where nothing tells.

    Args:
        parts: What the layouts located in its files.
        tensors: The same tensors, with their states.
        listing: The files.
    """
    names = set(_of_folders(listing)) | set(_of_states(tensors))
    for located in parts:
        names |= {located.framework} if located.framework else set()
        names.update(name for facts in located.facts for name in _of_object(facts))
    names = {name for name in names if not any(other.startswith(f"{name}, ") for other in names)}  # it says more
    first = sorted(names)[:_MOST]
    more = [f"{len(names) - _MOST} more"] if len(names) > _MOST else []
    return "; ".join(first + more) or None


def _of_object(facts: Facts) -> Iterator[str]:
    """By the keys of one file's object."""
    keys = facts.root.strings() if type(facts.root) is DictNode else {}
    yield from (name for name, wanted in _KEYS.items() if wanted <= keys.keys())
    version = keys.get("pytorch-lightning_version")
    if type(version) is str:
        yield f"Lightning {version}" if _VERSION.fullmatch(version) else "Lightning"
    file = facts.path.rpartition("/")[2]
    if _RANDOM_STATES.fullmatch(file) and {"random_state", "torch_manual_seed"} <= keys.keys():
        yield "Accelerate"
    for values in (keys, *(value.strings() for value in keys.values() if type(value) is DictNode)):
        if any(_is_flat(key, value) for key, value in values.items()):
            yield "FSDP1, flat parameters"
        groups = values.get("param_groups")
        if type(groups) is list and any(_is_flash(group) for group in groups):
            yield "FlashOptim"


def _is_flat(key: str, value: Any) -> bool:
    """Whether this is a rank's shard of what FSDP1 makes of all parameters of a module."""
    return local_shard(value) is not None and _FLAT.fullmatch(key) is not None


def _is_flash(group: Any) -> bool:
    return type(group) is DictNode and {"master_bytewidth", "quantize"} <= group.strings().keys()


def _of_states(tensors: Iterable[LogicalTensor]) -> Iterator[str]:
    """By the states that optimizers of other packages keep quantised."""
    for config in {tensor.state.codec for tensor in tensors if tensor.state is not None}:
        codec = json.loads(config)
        package, bits = (codec.get("name"), codec.get("bits")) if type(codec) is dict else (None, None)
        if type(package) is str and package in _OPTIMIZERS and bits in (4, 8):
            yield f"{_OPTIMIZERS[package]}, {bits}-bit states"


def _of_folders(listing: Listing) -> Iterator[str]:
    """By the files of each folder. A name that a folder has goes in front of those of the folders inside it."""
    if not listing.is_directory:
        return
    folders: dict[str, dict[str, ListedFile]] = defaultdict(dict)
    for path, file in listing.files.items():
        folder, _, name = path.rpartition("/")
        folders[folder][name] = file
        if folder:
            above, _, inner = folder.rpartition("/")
            folders[above][f"{inner}/{name}"] = file
    for files in folders.values():
        yield from (name for name, wanted in _FOLDERS.items() if all(_is_there(files, *mark) for mark in wanted))


def _is_there(files: Mapping[str, ListedFile], name: str, mark: bytes) -> bool:
    pattern = re.compile(name)
    return any(pattern.fullmatch(path) and re.search(mark, file.head) for path, file in files.items())
