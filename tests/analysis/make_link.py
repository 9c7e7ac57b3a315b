"""Writes small links of every kind of change, always of the same bytes.

`python -m tests.analysis.make_link` says what they are (once: when changes were still codecs).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import statecodec
from statecodec._version import __version__
from statecodec.format import Reader
from tests.format.support import manifest

EXPECTED = Path(__file__).parent / "golden_link" / "expected.json"
PACKINGS = ("none", "zstd")
RULES = (
    "same=raw", "noise=raw", "kept=cast", "grid=delta(inner=uniform(step=0.001))", "small*=delta",
    "half=residual(inner=cast)", "moved=residual(inner=companded(curve=linear))",
    "steps=residual(inner=uniform(step=0.00001))", "split=delta(inner=split)", "*=delta",
)  # fmt: skip


def write_links(folder: Path, packing: str) -> list[Path]:
    """Two links on a base, of one file whose numbers change a little."""
    generator = torch.Generator().manual_seed(7)
    w = torch.randn(40, 120, generator=generator)
    links: list[Path] = []
    for i in range(3):
        names = ("same", "kept", "grid", "moved", "steps", "split", "rest")
        tensors = {name: w * (1 + k) for k, name in enumerate(names)}
        tensors |= {"half": w.half(), "small0": w[0].clone(), "small1": w[1].clone(), "ids": torch.arange(5000) + i}
        tensors["noise"] = torch.randn(40, 120, generator=generator)
        source = folder / "c.safetensors"
        save_file(tensors, source)
        source.chmod(0o644)
        os.utime(source, ns=(10**18, 10**18))
        links.append(folder / f"{packing}{i}.sc.safetensors")
        base, rules = (links[-2], RULES) if i else (None, ())
        statecodec.compress(source, links[-1], preset="lossless", pack=packing, base=base, rules=rules, sha256=True)
        w = w + 1e-4 * torch.randn(40, 120, generator=generator)
    return links[1:]


def described(path: Path) -> dict[str, Any]:
    """The file's digest; and of every item the JSON of its form, and the digest of its parts."""
    value, items = manifest(path), {}
    with Reader(path) as reader:
        for i, number in enumerate(value["items"]["form"]):
            parts = [reader.read_chunk(i, k) for k in range(len(reader.items[i].chunks))]
            data = b"".join(
                p.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for c in parts for p in c.values()
            )
            items[reader.items[i].name] = [value["forms"][number], hashlib.sha256(data).hexdigest()]
    return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "items": items}


def main() -> None:
    files = {}
    for packing in PACKINGS:
        with tempfile.TemporaryDirectory() as folder:
            files[packing] = {link.name: described(link) for link in write_links(Path(folder), packing)}
    known = {"statecodec": __version__, "files": files}
    with EXPECTED.open("x") as file:
        file.write(json.dumps(known) + "\n")


if __name__ == "__main__":
    main()
