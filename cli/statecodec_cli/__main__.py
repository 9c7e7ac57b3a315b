"""Starts the command line, as `statecodec` and as `python -m statecodec_cli`."""

from __future__ import annotations

import gc
import sys

_OBJECTS = 100_000  # new objects, net, after which the collector looks for cycles


def main() -> int:
    """Run the command line; a Ctrl-C while it is still being imported ends it without a traceback.

    torch and numba make some hundred thousand objects that stay. By default the collector walks them again and again
    while they are imported, which is a sixth of the time that compressing 150 MB takes.
    """
    gc.set_threshold(_OBJECTS, 20, 100)
    try:
        from statecodec_cli.main import main as run

        return run()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
