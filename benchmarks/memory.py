"""Peak memory of compressing and restoring a 4 GB checkpoint that holds 1 GB tensors, each in a fresh process.

The process finds its kernels compiled: compiling them takes 100 MiB more, once on a machine.

python benchmarks/memory.py [--bytes 4000000000] [--largest 1073741824]        -> benchmarks/results/memory.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import CACHE, grown, record, trained

# VmHWM and not ru_maxrss, which a child inherits from the process that forked it.
_PEAK = r'import re; print(int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024)'
_PROGRAM = f"""
import json, sys, statecodec
verb, a, b, options = sys.argv[1:]
getattr(statecodec, verb)(a, b, force=True, **json.loads(options))
{_PEAK}
"""


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--bytes", type=int, default=4_000_000_000)
    parser.add_argument("--largest", type=int, default=1 << 30)
    arguments = parser.parse_args()
    source = grown(arguments.bytes, arguments.largest)
    packed, back = CACHE / "memory.sc.safetensors", CACHE / "memory.back"
    peaks: dict[str, float] = {}
    for preset in ("resume", "small", "tiny", "live", "lossless"):
        peak("compress", trained(), packed, preset=preset)
        peak("restore", packed, back)
        for verb, a, b, options in (("compress", source, packed, {"preset": preset}), ("restore", packed, back, {})):
            peaks[f"{preset}: {verb}"] = peak(verb, a, b, **options) / 2**20
            print(f"{preset} {verb}: {peaks[f'{preset}: {verb}']:.0f} MiB", flush=True)
    for path in (packed, back):
        path.unlink()
    imports = subprocess.run(
        [sys.executable, "-c", f"import torch; {_PEAK}"], check=True, capture_output=True, text=True
    ).stdout
    record(
        "memory",
        {
            "bytes": source.stat().st_size,
            "largest_tensor": arguments.largest,
            "import torch alone, MiB": int(imports) / 2**20,
            "peak RSS, MiB": peaks,
        },
    )


def peak(verb: str, source: Path, target: Path, **options: Any) -> int:
    """Bytes of a process that does no more than this."""
    command = [sys.executable, "-c", _PROGRAM, verb, str(source), str(target), json.dumps(options)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
