"""Makes an output in a folder of its own beside the destination, and moves it to its name once it is whole.

What is made in the folder (`statecodec.staging`) has its final name there: once it is finished it can be opened and
verified, before it is published.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from statecodec.errors import OutputExists, OutputFailed, UsageError
from statecodec.staging import Staging, os_errors


def check(target: Path, *, directory: bool = False, force: bool = False) -> None:
    """Raise UsageError or OutputExists if the destination is there and will not be replaced.

    With `force` a file replaces a file and a directory a directory; neither replaces the other, nor a device.
    """
    if not os.path.lexists(target):
        return
    if target.exists() and not (target.is_dir() if directory else target.is_file()):
        kind = "directory" if directory else "regular file"
        raise UsageError(f"{target} exists and is not a {kind}; it is not replaced by one")
    if not force:
        raise OutputExists(f"{target} exists; force (--force) replaces it")


class AtomicOutput:
    """One file or directory: made at `path` by any means, finished, then published as `target`.

        with AtomicOutput(target, force=force) as output:
            with output.create() as file:
                torch.save(value, file)
            output.finish()
            ...                     # read and verify output.path
            output.publish()

    Leaving the block without `publish` leaves nothing. An OSError in the block becomes OutputFailed. Raises UsageError
    and OutputExists if the destination is there and will not be replaced (see `check`).
    """

    def __init__(self, target: str | os.PathLike[str], *, directory: bool = False, force: bool = False) -> None:
        check(Path(target), directory=directory, force=force)
        self.target, self.directory, self.force = Path(os.path.realpath(target)), directory, force
        self.staging = Staging(self.target)
        self.path = self.staging.folder / self.target.name
        try:
            if directory:
                with os_errors(self.target):
                    os.mkdir(self.path)
        except BaseException:
            self.staging.close()
            raise

    @property
    def notes(self) -> tuple[str, ...]:
        """What the file system could not do, in words."""
        return self.staging.notes

    @contextlib.contextmanager
    def create(self) -> Iterator[BinaryIO]:
        """The output as a new binary file; its bytes are on the disk when the block ends."""
        with self.path.open("xb") as file:
            yield file
            file.flush()
            self.staging.sync(file.fileno())

    def finish(self) -> None:
        """Make a directory's entries durable; its files are, if each was synced when it was written."""
        if self.directory:
            for root, _, _ in os.walk(self.path):
                self.staging.sync_folder(Path(root))

    def publish(self) -> None:
        """Give the output its name and make that durable. Raises OutputExists, OutputFailed."""
        if self.directory:
            self.staging.publish_folder(self.target, force=self.force)
        else:
            self.staging.publish(self.target, force=self.force)

    def __enter__(self) -> AtomicOutput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.staging.close()
        if isinstance(value, OSError):
            raise OutputFailed(f"cannot write {self.target}: {value.strerror or value}") from value


def write_file(target: str | os.PathLike[str], data: bytes, *, force: bool = False) -> None:
    """Write a small file, whole or not at all. Raises UsageError, OutputExists, OutputFailed."""
    with AtomicOutput(target, force=force) as output:
        with output.create() as file:
            file.write(data)
        output.publish()
