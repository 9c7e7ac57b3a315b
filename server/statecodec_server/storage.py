"""Finished objects: a local folder by default, S3 and friends by a URL, all through obstore.

Keys are made by the service only: `<kind>/<random id>/<n>`. A file of the local machine is *adopted*: renamed into a
local store (after fsync, so a crash leaves it in one place or the other), streamed into a remote one.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import obstore
from obstore.store import LocalStore, ObjectStore, from_url

from .problems import HTTPProblem
from .settings import Bucket, Settings

BLOCK = 1 << 20
_CLIENT_OPTIONS = frozenset({"allow_http", "allow_invalid_certificates", "connect_timeout", "proxy_url", "timeout"})
_PART = 16 << 20
_KEY = re.compile(r"(uploads|results)/[0-9a-z]{8,40}(/[0-9a-z.]{1,60}){0,3}")


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_store(url: str, options: dict[str, str]) -> ObjectStore:
    """An obstore store for a URL; `file://` folders must exist. Credentials may also come from the environment."""
    if url.startswith("file:"):
        return from_url(url)
    client: Any = {key: value for key, value in options.items() if key in _CLIENT_OPTIONS}
    config: Any = {key: value for key, value in options.items() if key not in _CLIENT_OPTIONS}
    return from_url(url, config=config or None, client_options=client or None)


class Storage:
    """Objects under keys of our own making."""

    def __init__(self, settings: Settings) -> None:
        self.root: Path | None = None
        if settings.storage_url is None:
            self.root = settings.data.resolve() / "objects"
            self.root.mkdir(parents=True, exist_ok=True)
            self.store: ObjectStore = LocalStore(self.root)
        else:
            self.store = open_store(settings.storage_url, settings.storage_options)

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(f"not a key of this service: {key!r}")
        assert self.root is not None
        return self.root / key

    def adopt(self, path: Path, key: str) -> None:
        """Move a finished local file into the store under `key`; when it returns, the object is durable."""
        if self.root is None:
            with path.open("rb") as file:
                obstore.put(self.store, key, file, chunk_size=_PART, max_concurrency=2)
            path.unlink()
            return
        target = self._path(key)
        missing = [parent for parent in (target.parent, *target.parents) if not parent.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(path, target)
        fsync_directory(target.parent)
        for parent in missing:
            fsync_directory(parent.parent)

    def put(self, key: str, data: bytes) -> None:
        """Store a small document."""
        if self.root is None:
            obstore.put(self.store, key, data)
            return
        scratch = self._path(key).with_name(self._path(key).name + ".part")
        scratch.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(data)
        self.adopt(scratch, key)

    def local(self, key: str) -> Path | None:
        """Where the object lies on this machine's disk, if it does."""
        if self.root is None:
            return None
        path = self._path(key)
        return path if path.is_file() else None

    def exists(self, key: str) -> bool:
        """Whether there is such an object."""
        if self.root is not None:
            return self.local(key) is not None
        try:
            obstore.head(self.store, key)
        except FileNotFoundError:
            return False
        return True

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """`length` bytes of an object from `start`; without a length all of it, which must be small."""
        if length is None:
            return bytes(obstore.get(self.store, key).bytes())
        return bytes(obstore.get_range(self.store, key, start=start, length=length)) if length else b""

    def blocks(self, key: str) -> Iterator[bytes]:
        """All of an object, block by block."""
        for block in obstore.get(self.store, key).stream(min_chunk_size=BLOCK):
            yield bytes(block)

    async def stream(self, key: str, start: int, length: int) -> AsyncIterator[bytes]:
        """`length` bytes of an object from `start`, block by block, never more than one block in memory."""
        while length:
            size = min(length, BLOCK)
            yield bytes(await obstore.get_range_async(self.store, key, start=start, length=size))
            start, length = start + size, length - size

    def delete(self, prefix: str) -> None:
        """Remove every object under a prefix, and the space it takes."""
        if self.root is not None:
            path = self._path(prefix)
            shutil.rmtree(path, ignore_errors=True)
            path.unlink(missing_ok=True)
            return
        for batch in obstore.list(self.store, prefix=prefix):
            keys = [item["path"] for item in batch]
            if keys:
                obstore.delete(self.store, keys)

    def prefixes(self, kind: str) -> list[str]:
        """The ids that have objects of a kind."""
        if self.root is not None:
            folder = self.root / kind
            return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        folders = obstore.list_with_delimiter(self.store, prefix=kind)["common_prefixes"]
        return [prefix.rstrip("/").rsplit("/", 1)[-1] for prefix in folders]

    def check(self) -> None:
        """Raise when the store cannot be reached."""
        if self.root is not None:
            os.stat(self.root)
            return
        obstore.list_with_delimiter(self.store, prefix="uploads")


def bucket_files(bucket: Bucket, key: str, limit: int) -> list[tuple[str, str, int]]:
    """(relative name, key, bytes) of one object, or of everything under a key that ends in a slash.

    Raises a 422 problem when there is nothing, or more than `limit` objects.
    """
    store = open_store(bucket.url, bucket.options)
    if not key.endswith("/"):
        try:
            return [(key.rsplit("/", 1)[-1], key, int(obstore.head(store, key)["size"]))]
        except (FileNotFoundError, OSError):
            raise HTTPProblem(422, "job.input", f"There is no object {key!r} in that bucket.") from None
    objects: list[tuple[str, str, int]] = []
    for batch in obstore.list(store, prefix=key.rstrip("/")):
        objects += [(item["path"][len(key) :], item["path"], int(item["size"])) for item in batch]
        if len(objects) > limit:
            raise HTTPProblem(422, "job.input", f"More than {limit} objects lie under {key!r}.")
    if not objects:
        raise HTTPProblem(422, "job.input", f"No objects lie under {key!r}.")
    return objects


def download(bucket: Bucket, key: str, target: Path) -> None:
    """Copy one object of a bucket to a local file."""
    store = open_store(bucket.url, bucket.options)
    with target.open("wb") as file:
        for block in obstore.get(store, key).stream(min_chunk_size=BLOCK):
            file.write(block)
