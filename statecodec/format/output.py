"""Where an output goes: one file, or numbered shards and an index beside them."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from pathlib import Path

from statecodec import atomic
from statecodec.errors import FormatError
from statecodec.files import LocalFile
from statecodec.format.container import read_header
from statecodec.limits import Limits
from statecodec.staging import StagedFile, Staging, os_errors


class Destination:
    """The final names of an output's files, and the folder in which they are made under the same names.

    Raises UsageError, OutputExists and OutputFailed.
    """

    def __init__(self, path: str | os.PathLike[str], shards: int, force: bool) -> None:
        self.path = Path(os.path.realpath(path))
        self.force, self.sharded = force, shards > 1
        stem = self.path.name.removesuffix(".safetensors")
        self.index = self.path.with_name(f"{stem}.safetensors.index.json")
        names = [f"{stem}-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        self.files = [self.path.with_name(name) for name in names] if self.sharded else [self.path]
        self.opened = self.index if self.sharded else self.path
        self._shard = re.compile(rf"{re.escape(stem)}-\d{{5}}-of-\d{{5}}\.safetensors")
        for file in (Path(path), self.index, *self.files):
            atomic.check(file, force=force)
        self.staging = Staging(self.path)

    def mode(self) -> int | None:
        """Permissions of the file that will be replaced, if there is one: the new file takes them over."""
        for file in (self.path, self.index):
            with contextlib.suppress(FileNotFoundError):
                return stat.S_IMODE(file.stat().st_mode)
        return None

    def create(self, file: Path) -> StagedFile:
        """A file of this output, to be made."""
        return StagedFile(self.staging, file.name)

    def publish(self) -> None:
        """Make the finished files visible, all or none.

        Of a sharded output the new index comes last and the old one is removed first, so that at no moment an index
        names shards of another run.
        """
        targets = [*self.files, self.index] if self.sharded else self.files
        self.staging.publish(*targets, force=self.force, instead_of=self._predecessor() if self.force else ())

    def _predecessor(self) -> list[Path]:
        """What an earlier output of this name consists of: the index, shards of ours, the single file."""
        with os_errors(self.path):
            shards = [self.path.with_name(n) for n in os.listdir(self.path.parent) if self._shard.fullmatch(n)]
            return [self.index, *(f for f in shards if f in self.files or _is_ours(f)), self.path]


def _is_ours(path: Path) -> bool:
    with contextlib.closing(LocalFile(path)) as file:
        try:
            read_header(file, path.name, Limits())
        except (FormatError, EOFError):
            return False
    return True
