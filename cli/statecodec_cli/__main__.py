"""Starts the command line, as `statecodec` and as `python -m statecodec_cli`."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line; a Ctrl-C while it is still being imported ends it without a traceback."""
    try:
        from statecodec_cli.main import main as run

        return run()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
