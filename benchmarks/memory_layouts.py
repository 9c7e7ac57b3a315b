"""Peak memory of verbs on directories of shards: a DCP directory of 3 GB that two ranks saved, and ZeRO-2's of two.

python benchmarks/memory_layouts.py [--bytes 3000000000]        -> benchmarks/results/memory_layouts.json

Each verb is a process of its own, that finds its kernels compiled. The numbers are random.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from common import CACHE, ROOT, record
from memory import peak

sys.path.insert(0, str(ROOT.parent))  # the writers that tests have, too

FOLDER = CACHE / "memory_layouts"
RANKS, WIDTH = 2, 4096
ENDINGS = {"torch": ".pt", "safetensors": ".safetensors", "dcp": ".dcp", "zero-fp32": ".pt"}


def main() -> None:
    """Write both, measure, and record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--bytes", type=int, default=3_000_000_000)
    nbytes = parser.parse_args().bytes
    peaks: dict[str, float] = {}
    shutil.rmtree(FOLDER, ignore_errors=True)
    for size in (nbytes // 100, nbytes):  # the first compiles
        FOLDER.mkdir(parents=True)
        torch.multiprocessing.spawn(save_dcp, (size,), nprocs=RANKS)
        peaks |= measured("DCP", FOLDER / "dcp", ("torch", "safetensors", "dcp"))
        sizes = {"dcp": size_of(FOLDER / "dcp")}
        save_zero(FOLDER / "zero", size)
        peaks |= measured("ZeRO-2", FOLDER / "zero", ("zero-fp32",))
        sizes["zero"] = size_of(FOLDER / "zero")
        shutil.rmtree(FOLDER)
    record("memory_layouts", {"bytes": sizes, "peak RSS, MiB": peaks})


def measured(name: str, source: Path, layouts: tuple[str, ...]) -> dict[str, float]:
    """MiB of compressing, restoring, and converting to these layouts."""
    packed, made = FOLDER / "x.sc.safetensors", FOLDER / "made"
    calls: list[tuple[str, str, Path, Path, dict[str, Any]]] = [
        ("compress", "compress", source, packed, {"preset": "resume"}),
        ("restore", "restore", packed, made, {}),
    ]
    calls += [
        (f"convert{words} to {each}", "convert", path, made.with_suffix(ENDINGS[each]), {"layout": each})
        for words, path in (("", source), (" compressed", packed))
        for each in layouts
    ]
    found = {}
    for what, verb, a, b, options in calls:
        found[f"{name}: {what}"] = peak(verb, a, b, **options) / 2**20
        print(f"{name}: {what}: {found[f'{name}: {what}']:.0f} MiB", flush=True)
        if b != packed:
            shutil.rmtree(b) if b.is_dir() else b.unlink()
    packed.unlink()
    return found


def save_dcp(rank: int, nbytes: int) -> None:
    """Weights and moments, each cut along its first dimension; matrices of 201 MB and less."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    dist.init_process_group("gloo", init_method=f"file://{FOLDER}/rendezvous", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    weights, states = {}, {}
    for name, shape in shapes(nbytes // 12).items():
        local = (shape[0] // RANKS, *shape[1:])
        own = [torch.randn(local) * scale for scale in (0.02, 1e-4, 1e-4)]
        weight, m, v = (DTensor.from_local(t, mesh, [Shard(0)]) for t in (own[0], own[1], own[2].square_()))
        weights[name], states[name] = weight, {"step": torch.tensor(100.0), "exp_avg": m, "exp_avg_sq": v}
    group = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "params": list(weights)}
    dcp.save({"model": weights, "optimizer": {"state": states, "param_groups": [group]}}, checkpoint_id=FOLDER / "dcp")
    dist.destroy_process_group()


def save_zero(folder: Path, nbytes: int) -> None:
    """In DeepSpeed's structure: bf16 weights, and fp32 masters and moments as two ranks' flat vectors."""
    from tests.layouts.written_zero import written

    torch.manual_seed(0)
    files = written(2, [{name: torch.randn(shape) * 0.02 for name, shape in shapes(nbytes // 14).items()}], RANKS)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path)


def shapes(numel: int) -> dict[str, tuple[int, int]]:
    """About so many parameters: an embedding of a quarter of them, at most, and layers."""
    rows = max(1, min(3 * WIDTH, numel // (4 * WIDTH)) // RANKS) * RANKS
    found, left = {"embedding": (rows, WIDTH)}, numel - rows * WIDTH
    while left > 0:
        found[f"layers.{len(found)}"] = (min(WIDTH, rows), WIDTH)
        left -= min(WIDTH, rows) * WIDTH
    return found


def size_of(folder: Path) -> int:
    """Bytes of all files."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


if __name__ == "__main__":
    main()
