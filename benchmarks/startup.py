"""What importing costs beyond torch, and how long --help takes; medians of nine fresh processes.

python benchmarks/startup.py        -> benchmarks/results/startup.json
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from common import record

_EVERYTHING = (
    "import statecodec; statecodec.compress, statecodec.load; from statecodec import kernels; kernels.get('cpu')"
)


def main() -> None:
    """Measure and record."""
    python = [sys.executable, "-c"]
    torch_alone = seconds([*python, "import torch"])
    record(
        "startup",
        {
            "import torch, s": torch_alone,
            "import statecodec beyond torch, s": seconds([*python, "import torch, statecodec"]) - torch_alone,
            "and everything compress needs, numba included, beyond torch, s": seconds(
                [*python, f"import torch; {_EVERYTHING}"]
            )
            - torch_alone,
            "statecodec --help, s": seconds([sys.executable, "-m", "statecodec_cli", "--help"]),
        },
    )


def seconds(command: list[str]) -> float:
    """Median wall time."""
    times = []
    for _ in range(9):
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


if __name__ == "__main__":
    main()
