"""Makes the golden files, and the hex dump in docs/format.md.

    python -m tests.format.make_golden            writes what is missing, and refuses to change what is there
    python -m tests.format.make_golden --renew    writes this version's anew: only while it is being made

A golden file is a promise: every later reader reads it. To add one, add it to FILES and run this once.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statecodec.codecs import Codec, EncodedTensor, LowRank, parse
from statecodec.format import Reader
from statecodec.format.container import VERSION
from tests.format.support import bytes_of, forge, write

GOLDEN = Path(__file__).parent / "golden"
DOCS = Path(__file__).parents[2] / "docs" / "format.md"
EXPECTED = GOLDEN / "expected.json"
MARK = "make_golden.py -->\n```text\n"
# Those without a number are of version 1.0.
FILES = {
    "plain.safetensors": ("none", None),
    "packed.safetensors": ("zstd", None),
    "sharded.safetensors": ("zstd", 40_000),
    "example.safetensors": ("zstd", None),
    "conv.safetensors": ("zstd", None),  # more than two dimensions: rows along the last one
    "plain-1.1.safetensors": ("none", None),
    "packed-1.1.safetensors": ("zstd", None),
    "example-1.1.safetensors": ("zstd", None),
    "plain-2.0.safetensors": ("none", None),
    "packed-2.0.safetensors": ("zstd", None),
    "sharded-2.0.safetensors": ("zstd", 150_000),
    "example-2.0.safetensors": ("zstd", None),
    "ulps-2.0.safetensors": ("zstd", None),
    "same-2.0.safetensors": ("zstd", None),
    "example-2.1.safetensors": ("zstd", None),
    "following-2.1.safetensors": ("zstd", None),
    "example-2.2.safetensors": ("zstd", None),
    "predicted-2.2.safetensors": ("predicted", None),
}
EXAMPLE = "example-2.2.safetensors"  # on the page


def values(*shape: int, scale: float = 0.02, seed: int = 1) -> Tensor:
    """Bell-shaped numbers from integer arithmetic alone: the same on every machine."""
    n = 1
    for d in shape:
        n *= d
    i = torch.arange(n, dtype=torch.int64) + seed * 1_000_003
    total = torch.zeros(n, dtype=torch.float64)
    for k in range(1, 5):
        total += ((i * 2654435761 * k + (i >> 3) * 40503) % (1 << 20)).double() / (1 << 20) - 0.5
    return (total * scale).float().reshape(shape)


def tensors() -> dict[str, tuple[Tensor, Codec]]:
    """One item per codec and dtype, large enough to be packed where it can be."""
    w = values(40, 64)
    product = (
        values(200, 1, scale=1.0).exp() * values(1, 96, scale=1.0, seed=2).exp() * values(200, 96, scale=0.3).exp()
    )
    log = parse("companded(curve=log,bits=4,group=32)").encode(product).parts["codes"]
    special = w.clone().view(-1)
    special[:6] = torch.tensor([float("inf"), -float("inf"), float("nan"), -0.0, 1e-42, 3e38])
    return {
        "raw.float32": (special.view(40, 64), parse("raw")),
        "raw.bfloat16": (w.bfloat16(), parse("raw")),
        "raw.float16": (w.half(), parse("raw")),
        "raw.float64": (w.double() / 3, parse("raw")),
        "raw.int64": (torch.arange(600), parse("raw")),
        "raw.bool": (w[:10] > 0, parse("raw")),
        "raw.uint8": (torch.arange(5000).to(torch.uint8), parse("raw")),
        "raw.complex64": (torch.view_as_complex(values(300, 2)), parse("raw")),
        "raw.product": (product, parse("raw")),  # its exponents are stored centred (method 3) ...
        "raw.nibbles": (log, parse("raw")),  # ... and its 4-bit codes by nibbles (method 4)
        "raw.zeros": (torch.zeros(64, 32), parse("raw")),
        "raw.scalar": (torch.tensor(3.0), parse("raw")),
        "raw.empty": (torch.empty(0, 3), parse("raw")),
        "split.bf16.8": (w, parse("split")),
        "split.bf16.16": (w, parse("split(low_bits=16)")),
        "cast": (w, parse("cast")),
        "companded.softsign": (w, parse("companded(curve=softsign)")),
        "companded.log": (w.square(), parse("companded(curve=log)")),
        "companded.sqrt": (w.square(), parse("companded(curve=sqrt)")),
        "companded.linear": (w, parse("companded(curve=linear)")),
        "companded.4": (w, parse("companded(bits=4,group=32)")),
        "folded": (w, parse("folded(level=2)")),
        "folded.companded": (values(40, 200), parse("folded(level=1,inner=companded)")),
        "shared": (w.square(), parse("shared(dims=[1])")),
        "lowrank": (values(40, 3) @ values(3, 64, seed=2), parse("lowrank(rank=4)")),
        "dropped": (w, parse("dropped")),
        **codes(),
    }


def codes() -> dict[str, tuple[Tensor, Codec]]:
    """What version 1.1 brought: codes of every width, with outliers and zeros, in every form that packing has."""
    wide, tall = values(90, 64, scale=1.0), values(200, 48, scale=1.0, seed=3)
    wide[3, 5], wide[70, 1], wide[8, :40] = 1e30, -7e5, 0.0
    second = tall.square() * values(200, 1, scale=9.0).exp() * values(1, 48, scale=9.0, seed=2).exp()
    second[:, 7], second[11] = 0.0, 0.0
    kernel = values(12, 40, 3, 3)
    narrow = [values(64, 64, scale=2.0**k).to(torch.int32) for k in (0, 3, 7, 9, 11, 13, 15)]
    return {
        "uniform": (wide, parse("uniform(step=0.0001220703125)")),
        "uniform.small": (wide, parse("uniform(step=0.5)")),
        "companded.conv": (kernel, parse("companded")),
        "companded.conv.last": (kernel, parse("companded(rows=last)")),
        "folded.conv": (kernel, parse("folded(level=1)")),
        "lowrank.conv": (kernel, parse("lowrank(rank=2)")),
        "logarithmic": (second, parse("logarithmic")),
        "logarithmic.nibbles": (second, parse("logarithmic(per_octave=1)")),
        "direction": (tall, parse("direction(step=0.0625)")),
        "direction.float16": (tall.half(), parse("direction(step=0.5,eps=1e-6)")),
        "raw.int16.terms": (parse("logarithmic").encode(second).parts["codes"], parse("raw")),
        "raw.int16.nibbles": (parse("logarithmic(per_octave=1)").encode(second).parts["codes"], parse("raw")),
        **{f"raw.int32.{k}": (x, parse("raw")) for k, x in enumerate(narrow)},
    }


def mixed_precision() -> dict[str, tuple[Tensor, Codec]]:
    """A master on a grid that takes small numbers to 0, and the weights that are its rounded copies."""
    master = values(90, 64)
    master[3, :5] = torch.tensor([0.0, -0.0, 1e-30, -1e-42, 3e38])
    return {
        "raw": (master, parse("raw")),
        "master": (master, parse("uniform(step=0.0001220703125)")),
        "ulps": (master.bfloat16(), parse("ulps")),
        "ulps.float16": (master.clamp(-6e4, 6e4).half(), parse("ulps")),
    }


def copies() -> dict[str, tuple[Tensor, Codec]]:
    """Tensors that are there twice."""
    w = values(90, 64)
    content = {"raw": (w, parse("raw")), "uniform": (w, parse("uniform(step=0.0001220703125)"))}
    return content | {"same": (w.clone(), parse("same")), "same.uniform": (w.clone(), parse("same"))}


def averages() -> dict[str, tuple[Tensor, Codec]]:
    """Running averages of weights on a grid: near, far beyond the grid, equal."""
    weight = values(90, 64)
    weight[3, :5] = torch.tensor([0.0, -0.0, 1e-30, -1e-42, 3e37])
    average = weight + values(90, 64, scale=0.001, seed=2)
    average[7, :3] = torch.tensor([0.0, 1e4, -3e37])
    return {
        "raw": (weight, parse("raw")),
        "weight": (weight, parse("uniform(step=0.0001220703125)")),
        "following": (average, parse("following(step=0.0001220703125)")),
        "following.float16": (average.clamp(-6e4, 6e4).half(), parse("following(step=0.0009765625)")),
        "following.equal": (weight.clone(), parse("following(step=0.0001220703125)")),
    }


def low_rank() -> dict[str, tuple[Tensor, Codec]]:
    """Codes close to a few outer products: around 0, and around a row term plus a column term."""
    direction = values(240, 3, scale=1.0) @ values(3, 192, scale=1.0, seed=2) + values(240, 192, scale=0.1, seed=3)
    direction[7], direction[:, 5], direction[9, 9] = 0.0, 0.0, 1e4
    terms = values(240, 1, scale=9.0).exp() * values(1, 192, scale=9.0, seed=2).exp()
    second = (2.0 * direction.clamp(-4, 4)).exp() * terms
    second[7], second[:, 5] = 0.0, 0.0
    return {
        "uniform": (direction, parse("uniform(step=0.03125)")),
        "logarithmic": (second, parse("logarithmic")),
        "raw.int32": (parse("uniform(step=0.03125)").encode(direction).parts["codes"], parse("raw")),
        "raw.int16": (parse("logarithmic").encode(second).parts["codes"], parse("raw")),
        "raw.conv": (parse("uniform(step=0.0625)").encode(direction.view(240, 16, 4, 3)).parts["codes"], parse("raw")),
    }


COMPANIONS = {
    **{name: {"weight": "weight"} for name in ("following", "following.float16")},
    "following.equal": {"weight": "raw"},
    **{name: {"master": "master"} for name in ("ulps", "ulps.float16")},
    **{name: {"exp_avg_sq": "logarithmic"} for name in ("direction", "direction.float16")},
    "same": {"original": "raw"},
    "same.uniform": {"original": "uniform"},
}


def example() -> dict[str, tuple[Tensor, Codec]]:
    return {"step": (torch.tensor(3.0), parse("raw")), "exp_avg": (torch.zeros(32, 32), parse("raw"))}


CONTENTS: dict[str, Callable[[], dict[str, tuple[Tensor, Codec]]]] = {
    "example": example, "ulps": mixed_precision, "same": copies, "following": averages,
    "predicted": low_rank,
}  # fmt: skip
"""By the first word of a file's name; all others hold `tensors`."""


def expected(path: Path) -> dict[str, Any]:
    """Digests of a golden: of its file or files, and of every item decoded by the reference kernels."""
    with Reader(path) as reader:
        read = {i.name: reader.read(i.name) for i in reader.items}
        items = {i.name: _numbers(read[i.name], i.companions, read) for i in reader.items}
        files = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in (*reader.files, reader.path)}
        decoded = {name: hashlib.sha256(bytes_of(t)).hexdigest() for name, t in items.items()}
        return {"opened": reader.path.name, "files": files, "decoded": decoded}


def _numbers(encoded: EncodedTensor, companions: Mapping[str, str], others: Mapping[str, EncodedTensor]) -> Tensor:
    """The decoded tensor; of a low-rank item its parts, as a matrix product is not the same to the bit everywhere."""
    if isinstance(encoded.codec, LowRank):
        return torch.cat([part.reshape(-1).view(torch.uint8) for part in encoded.parts.values()])
    given = {role: others[name].decode(backend="reference") for role, name in companions.items()}
    return encoded.decode(backend="reference", companions=given)


def hexdump(data: bytes) -> str:
    """Offset, 16 bytes, their characters; a run of equal lines as one `*`."""
    lines, last = [], b""
    for at in range(0, len(data), 16):
        row = data[at : at + 16]
        if row == last:
            if lines[-1] != "*":
                lines.append("*")
            continue
        last = row
        text = "".join(chr(b) if 32 <= b < 127 else "." for b in row)
        lines.append(f"{at:06x}  {row.hex(' '):<47}  {text}")
    return "\n".join([*lines, f"{len(data):06x}"]) + "\n"


def main(renew: bool) -> None:
    GOLDEN.mkdir(exist_ok=True)
    known = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
    for name, (packing, shard) in FILES.items():
        if name in known and not (renew and f"-{VERSION[0]}.{VERSION[1]}." in name):
            continue
        if "-" not in name:
            raise SystemExit(f"{name} is of version 1.0, which this writer no longer writes: it is in the history")
        kind = name.partition("-")[0]
        content = CONTENTS.get(kind, tensors)()
        if name.startswith("packed"):  # of several chunks, and constant, or it would be large
            content["raw.chunks"] = (torch.zeros(3, 700_000, dtype=torch.int8), parse("raw"))
        written = write(
            GOLDEN / name, content, packing=packing, max_shard_size=shard, force=renew, companions=COMPANIONS
        )
        if name == EXAMPLE:  # its manifest is there to be read
            written.path.write_bytes(forge(written.path.read_bytes(), lambda manifest: manifest))
        known[name] = expected(written.path)
        print(f"wrote {written.path.name} and its shards, {written.nbytes:,} bytes", file=sys.stderr)
    EXPECTED.write_text(json.dumps(known, indent=1) + "\n")
    before, mark, rest = DOCS.read_text().partition(MARK)
    after = rest[rest.index("```") :]
    DOCS.write_text(before + mark + hexdump((GOLDEN / EXAMPLE).read_bytes()) + after)


if __name__ == "__main__":
    main(renew="--renew" in sys.argv)
