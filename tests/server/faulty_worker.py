"""A worker that kills itself (-9) once at a named place: `before:stage`, `after:convert`, `during:convert` ...

The place comes from KILL_AT; that it has happened is written down in the data folder first, so that the restarted
worker carries on.
"""

import os
import signal
import sys
import threading
from pathlib import Path

from statecodec_server import phases, worker
from statecodec_server.settings import Settings


def die_once(settings, place):
    """kill -9 of this very process, the first time only."""
    marker = settings.data / f"died-{place.replace(':', '-')}"
    if marker.exists():
        return
    marker.touch()
    os.kill(os.getpid(), signal.SIGKILL)


def arm(settings, place):
    """Put the trap at the place."""
    when, name = place.split(":")
    original = getattr(phases.JobPhases, name)

    def trapped(self, *arguments):
        if when == "before":
            die_once(settings, place)
        if when == "during":
            threading.Timer(0.3, die_once, (settings, place)).start()
        result = original(self, *arguments)
        if when == "after":
            die_once(settings, place)
        return result

    setattr(phases.JobPhases, name, trapped)


if __name__ == "__main__":
    found = Settings()
    if os.environ.get("KILL_AT"):
        arm(found, os.environ["KILL_AT"])
    Path(found.data).mkdir(parents=True, exist_ok=True)
    worker.run(found, int(sys.argv[1]), supervised=True)
