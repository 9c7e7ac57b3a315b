"""Compiles the library's kernels by using them: `python -m statecodec_server.warm BACKEND`, in an empty folder.

It does what jobs do, on a checkpoint of its own making, before there is any job. What a job needs beyond that is
compiled in the job's process and forgotten with it.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from statecodec.operations import PRESETS

_RESTORABLE = [preset for preset in PRESETS if preset != "weights"]  # that one drops the moments


def _checkpoint(path: Path, dtype: Any, scale: float = 1.0) -> Path:
    """A model's weights of one dtype, with AdamW's moments, as torch saves them."""
    import torch

    torch.manual_seed(0)
    shapes = {"embed.weight": (512, 64), "layer.weight": (256, 64), "layer.bias": (256,), "norm.weight": (64,)}
    model = {name: (torch.randn(shape) * 0.02 * scale).to(dtype) for name, shape in shapes.items()}
    state = {
        index: {"step": torch.tensor(7.0), "exp_avg": torch.randn(shape) * 1e-3, "exp_avg_sq": torch.rand(shape) * 1e-6}
        for index, shape in enumerate(shapes.values())
    }
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "params": list(state)}
    torch.save({"model": model, "optimizer": {"state": state, "param_groups": [group]}}, path)
    return path


def _use(library: Any, folder: Path) -> None:
    import torch

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        subfolder = folder / str(dtype)
        subfolder.mkdir()
        source, later = _checkpoint(subfolder / "a.pt", dtype), _checkpoint(subfolder / "b.pt", dtype, 1.001)
        for preset in _RESTORABLE:
            small = subfolder / f"{preset}.sc.safetensors"
            library.compress(source, small, preset=preset)
            library.verify(small, source)
            library.diff(source, small)
            library.restore(small, subfolder / f"{preset}.pt")
        chained = subfolder / "chained.sc.safetensors"
        library.compress(later, chained, base=subfolder / "lossless.sc.safetensors", preset="lossless")
        library.restore(chained, subfolder / "back.pt")
        library.analyze(source)
    library.convert(_checkpoint(folder / "a.pt", torch.float32), folder / "foam.pt", ("foam",))


def main() -> None:
    """Use everything once; a backend without checkpoints to convert has nothing to compile."""
    library = import_module(sys.argv[1])
    if hasattr(library, "convert"):
        with suppress(BrokenPipeError):
            _use(library, Path.cwd())


if __name__ == "__main__":
    main()
