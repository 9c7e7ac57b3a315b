"""From measured costs per byte and per tensor to checkpoints that do not fit here: the tables of docs/scaling.md.

Measured: bytes per parameter (quality.json), gigabytes per CPU second (speed.json), seconds and bytes per tensor
(scaling.json). Assumed: the machines in `Site`, and that work which is independent takes its share of the cores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Result = Mapping[str, Any]

MODELS = {"8 B": (8e9, 291), "70 B": (70e9, 723), "1 T": (1e12, 100_000)}  # parameters, weight tensors
RANKS = (8, 64, 512, 4096)
PLAIN = 12.0  # bytes a parameter: fp32 master weights and two moments


@dataclass(frozen=True)
class Site:
    """What is assumed of the machines; nothing of it was measured here."""

    ranks_per_host: int = 8
    cores_per_rank: int = 8
    host_to_storage: float = 5e9
    """Bytes a second that one host writes or reads."""
    storage: float = 100e9
    """Bytes a second that the file system takes from all hosts together."""
    device_to_host: float = 25e9
    """Bytes a second that a GPU copies into pinned memory."""

    def transfer(self, nbytes: float, ranks: int) -> float:
        """Seconds to write or read so many bytes from all ranks at once."""
        hosts = max(ranks // self.ranks_per_host, 1)
        return nbytes / min(hosts * self.host_to_storage, self.storage)


@dataclass(frozen=True)
class Costs:
    """What was measured."""

    per_param: float
    """Bytes of a compressed checkpoint."""
    compress: float
    """Bytes of the original a CPU second."""
    restore: float

    @classmethod
    def of(cls, preset: str, quality: Result, speed: Result) -> Costs:
        """Of a preset, from results/*.json."""
        rates = speed["contenders"][f"statecodec {preset}"]
        return cls(
            quality["presets"][preset]["bytes_per_param"], rates["compress_cpu"] * 1e9, rates["restore_cpu"] * 1e9
        )


def save(params: float, ranks: int, costs: Costs, site: Site) -> dict[str, float]:
    """Seconds and bytes of one save, each rank its own shards, and of going on from it on another number of ranks."""
    plain, packed = PLAIN * params, costs.per_param * params
    cores = ranks * site.cores_per_rank
    encode, decode = plain / (costs.compress * cores), plain / (costs.restore * cores)
    return {
        "plain bytes": plain,
        "bytes": packed,
        "plain seconds": site.transfer(plain, ranks),
        "encode": encode,
        "write": site.transfer(packed, ranks),
        "seconds": max(encode, site.transfer(packed, ranks)),  # a stream: the slower of the two decides
        "blocked": plain / ranks / site.device_to_host,  # of an asynchronous save: the copy into host memory
        "host memory": plain / ranks * site.ranks_per_host,
        "resume": max(decode, site.transfer(packed, ranks)),
        "plain resume": site.transfer(plain, ranks),
    }


def offline(params: float, cores: int, costs: Costs, site: Site) -> dict[str, float]:
    """Seconds of compressing a checkpoint that lies on the shared file system, in shares."""
    plain, packed = PLAIN * params, costs.per_param * params
    ranks = max(cores // site.cores_per_rank, 1)
    encode = max(plain / (costs.compress * cores), site.transfer(plain, ranks))
    return {"shares": encode, "join": packed / site.host_to_storage, "all": encode + packed / site.host_to_storage}


def planning(items: int, scaling: Result) -> dict[str, float]:
    """CPU seconds and bytes for so many stored tensors, from the largest number that was measured."""
    largest = max(scaling["items"], key=int)
    measured, n = scaling["items"][largest], int(largest)
    seconds = {name: stage["cpu"] * items / n for name, stage in measured["stages"].items()}
    return {**seconds, "peak": max(s["peak"] for s in measured["stages"].values()) * items / n}


def seconds(value: float) -> str:
    """A duration as people say it."""
    if value >= 5400:
        return f"{value / 3600:.1f} h"
    return f"{value / 60:.1f} min" if value >= 90 else f"{value:.2g} s" if value < 10 else f"{value:.0f} s"


def size(value: float) -> str:
    """Bytes as people say them."""
    return f"{value / 1e12:.2f} TB" if value >= 1e12 else f"{value / 1e9:.0f} GB"


def save_table(preset: str, quality: Result, speed: Result) -> list[str]:
    """All models on all numbers of ranks."""
    costs, site = Costs.of(preset, quality, speed), Site()
    lines = [
        "| parameters | ranks | plain | written | save | of it encoding | plain save | resume | plain resume "
        "| async: training waits | host memory |",
        "| --- " * 11 + "|",
    ]
    for model, (params, _) in MODELS.items():
        for ranks in RANKS:
            s = save(params, ranks, costs, site)
            if PLAIN * params / ranks > 80e9:  # does not fit a GPU
                continue
            lines.append(
                f"| {model} | {ranks:,} | {size(s['plain bytes'])} | {size(s['bytes'])} | {seconds(s['seconds'])} "
                f"| {seconds(s['encode'])} | {seconds(s['plain seconds'])} | {seconds(s['resume'])} "
                f"| {seconds(s['plain resume'])} | {seconds(s['blocked'])} | {size(s['host memory'])} a host |"
            )
    enough = PLAIN * site.host_to_storage / (costs.per_param * costs.compress)
    return [*lines, "", f"With fewer than {enough:.0f} cores a host, encoding would take longer than writing."]


def offline_table(preset: str, quality: Result, speed: Result) -> list[str]:
    """All models on some numbers of cores."""
    costs, site = Costs.of(preset, quality, speed), Site()
    lines = ["| parameters | cores | shares | joining | in all |", "| --- " * 5 + "|"]
    for model, (params, _) in MODELS.items():
        for cores in (16, 256, 4096):
            o = offline(params, cores, costs, site)
            lines.append(
                f"| {model} | {cores:,} | {seconds(o['shares'])} | {seconds(o['join'])} | {seconds(o['all'])} |"
            )
    return lines


def planning_table(scaling: Result) -> list[str]:
    """What was measured, by number of tensors."""
    names = list(next(iter(scaling["items"].values()))["stages"])
    lines = [
        "| stored tensors | " + " | ".join(f"{name}, CPU s" for name in names) + " | bytes a tensor beyond its own "
        "| peak memory |",
        "| --- " * (len(names) + 3) + "|",
    ]
    for items, measured in scaling["items"].items():
        stages = measured["stages"]
        beyond = (measured["compressed"] - measured["tensor_bytes"]) / int(items)
        peak = max(stage["peak"] for stage in stages.values()) / 2**20
        lines.append(
            f"| {int(items):,} | "
            + " | ".join(f"{stages[name]['cpu']:.1f}" for name in names)
            + f" | {beyond:.0f} | {peak:,.0f} MiB |"
        )
    return lines
