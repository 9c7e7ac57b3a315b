"""What a writer has made: an output that is whole and on the disk, first under a temporary name, then under its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from statecodec.errors import FormatError, OutputFailed, UsageError
from statecodec.format.container import VERSION
from statecodec.format.items import StoredItem
from statecodec.format.output import Destination
from statecodec.format.reader import Reader


@dataclass(frozen=True)
class Written:
    """An output. `path` is what a Reader opens: the file, or the index of a sharded output. `notes`: what the file
    system could not do for durability or permissions, in words.
    """

    path: Path
    files: tuple[Path, ...]
    nbytes: int
    items: tuple[StoredItem, ...]
    version: tuple[int, int] = VERSION
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finished:
    """An output that is whole and on the disk, but has not its name yet: `reader` reads it, as any reader will.

    `path` and `files` lie in the writer's temporary folder. Leaving the writer removes that and closes `reader`.
    """

    path: Path
    files: tuple[Path, ...]
    nbytes: int
    items: tuple[StoredItem, ...]
    reader: Reader
    _destination: Destination

    def publish(self) -> Written:
        """Make it visible under its name, all files or none. Raises OutputExists, OutputFailed."""
        place = self._destination
        place.publish()
        return Written(place.opened, tuple(place.files), self.nbytes, self.items, notes=place.staging.notes)


def opened(path: Path) -> Reader:
    """A finished output, open. Raises UsageError if readers refuse it, OutputFailed."""
    try:
        return Reader(path)
    except FormatError as error:
        if isinstance(error.__cause__, OSError):
            raise OutputFailed(f"cannot read what was written: {error}") from error
        raise UsageError(f"readers would refuse the output: {error}") from error
