"""What a writer has made: a whole output on the disk, first under a temporary name, then under its own."""

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
    """A published output.

    Args:
        path: What a Reader opens: the file, or the index of a sharded output.
        files: All files.
        nbytes: Their size, in bytes.
        items: What they hold.
        version: (major, minor) of the format.
        notes: What the file system could not do for durability or permissions, in words.
    """

    path: Path
    files: tuple[Path, ...]
    nbytes: int
    items: tuple[StoredItem, ...]
    version: tuple[int, int] = VERSION
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finished:
    """An output that is whole and on the disk, but under a temporary name. Leaving the writer removes it.

    Args:
        path: What `reader` has opened, in the writer's temporary folder.
        files: All files, there.
        nbytes: Their size, in bytes.
        items: What they hold.
        reader: Reads it, as any reader will. Leaving the writer closes it.
    """

    path: Path
    files: tuple[Path, ...]
    nbytes: int
    items: tuple[StoredItem, ...]
    reader: Reader
    _destination: Destination

    def publish(self) -> Written:
        """Give the output its name, all files or none.

        Returns:
            What is there now.

        Raises:
            OutputExists: If the name is taken, without `force`.
            OutputFailed: If the files cannot be renamed.
        """
        destination = self._destination
        destination.publish()
        return Written(
            destination.opened, tuple(destination.files), self.nbytes, self.items, notes=destination.staging.notes
        )


def opened(path: Path) -> Reader:
    """A finished output, open. Raises UsageError if readers refuse it, OutputFailed."""
    try:
        return Reader(path)
    except FormatError as error:
        if isinstance(error.__cause__, OSError):
            raise OutputFailed(f"cannot read what was written: {error}") from error
        raise UsageError(f"readers would refuse the output: {error}") from error
