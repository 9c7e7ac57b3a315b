"""Uploads: created with a length, filled from an acknowledged offset, finished into the store.

States: `receiving` -> `finishing` (every byte durable, digest and move under way) -> `ready`, or `refused` when the
whole is not what was announced. The database row, written after fsync, is the only truth about the offset.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import sqlalchemy as sa
from anyio.to_thread import run_sync

from .database import Database, add, uploads
from .digests import Checksum
from .problems import HTTPProblem, not_found, storage_problem
from .quotas import Quotas
from .receiving import Receiver
from .settings import Settings
from .spool import Spool, blocks_sha256, file_sha256
from .storage import Storage
from .tokens import Principal

log = logging.getLogger("statecodec.server.uploads")
Row = Mapping[str, Any]
_ID = re.compile(r"[0-9a-z]{26}")
FINISH_PATIENCE = 10.0
TURN_PATIENCE = 20.0


@dataclass(frozen=True)
class NewUpload:
    """What a client says about a file before sending it. `length` None: known only at the end of the body."""

    name: str
    length: int | None
    metadata: str = ""
    announced: str | None = None


class Uploads:
    """All uploads of this service; one process at a time owns the spool folder."""

    def __init__(self, settings: Settings, database: Database, storage: Storage, quotas: Quotas) -> None:
        self._settings, self._database, self._storage, self._quotas = settings, database, storage, quotas
        self._spool = settings.data / "spool"
        self._spool.mkdir(parents=True, exist_ok=True)
        self._turns: dict[str, asyncio.Lock] = {}
        self._receivers: dict[str, Receiver] = {}
        self._digests: dict[str, tuple[int, Any]] = {}
        self._finishers: dict[str, asyncio.Task[None]] = {}
        self.draining = False

    def path(self, identity: str) -> Path:
        """The spool file of an upload. Raises a 404 problem for what is no identity of ours."""
        if not _ID.fullmatch(identity):
            raise not_found("upload")
        return self._spool / identity

    def create(self, principal: Principal, new: NewUpload) -> Row:
        """Record a new upload.

        Raises problems 413 (too large), 429 (too many uploads) and 507 (no space, or no quota left).
        """
        now, settings = time.time(), self._settings
        if new.length is not None and new.length > settings.max_upload:
            raise HTTPProblem(413, "body.size", f"The largest upload here is {int(settings.max_upload):,} bytes.")
        self._quotas.check(principal.id, new.length or 0)
        row = {
            "id": secrets.token_hex(13),
            "token": principal.id,
            "name": new.name,
            "metadata": new.metadata,
            "length": new.length,
            "offset": 0,
            "state": "receiving",
            "announced": new.announced,
            "sha256": None,
            "created": now,
            "expires": now + settings.upload_ttl,
        }
        with self._database.write() as connection:
            count = sa.select(sa.func.count()).where(uploads.c.token == principal.id)
            if connection.execute(count).scalar_one() >= settings.max_uploads:
                raise HTTPProblem(429, "upload.limit", f"One token holds at most {settings.max_uploads:,} uploads.")
            connection.execute(uploads.insert().values(row))
        return row

    def get(self, principal: Principal, identity: str) -> Row:
        """An upload of this token. Raises a 404 problem when it has none of this identity."""
        row = self._database.one(sa.select(uploads).where(uploads.c.id == identity, uploads.c.token == principal.id))
        if row is None:
            raise not_found("upload")
        return row

    def newest(self, principal: Principal) -> list[Row]:
        """The newest uploads of this token."""
        query = sa.select(uploads).where(uploads.c.token == principal.id)
        return self._database.all(query.order_by(uploads.c.created.desc()).limit(200))

    async def settle(self, principal: Principal, identity: str) -> Row:
        """The upload after whatever is writing it has been stopped and has saved what came (HEAD)."""
        await run_sync(self.get, principal, identity)
        async with self._turn(identity):
            return await run_sync(self.get, principal, identity)

    async def append(
        self, principal: Principal, identity: str, offset: int, body: AsyncIterator[bytes], checksum: Checksum | None
    ) -> Row:
        """Take a body in at `offset`; what can be kept is durable and recorded when this returns or raises."""
        await run_sync(self.get, principal, identity)
        async with self._turn(identity):
            row = await run_sync(self.get, principal, identity)
            if row["state"] == "refused":
                raise HTTPProblem(410, "upload.gone", "This upload was refused: its digest was wrong. Start a new one.")
            if offset != row["offset"] or row["state"] != "receiving":
                raise HTTPProblem(
                    409,
                    "upload.offset",
                    f"This upload is at {row['offset']}, the request at {offset}.",
                    headers={"Upload-Offset": str(row["offset"])},
                    offset=row["offset"],
                )
            await self._receive(row, body, checksum)
        return await self._finished(principal, identity)

    async def _receive(self, row: Row, body: AsyncIterator[bytes], checksum: Checksum | None) -> None:
        identity = row["id"]
        hashed, digest = self._digests.pop(identity, (0, None))
        spool = await run_sync(Spool, self.path(identity), row["offset"], self._start_digest(row, hashed, digest))
        receiver = Receiver(self._settings, spool, row, checksum, partial(self._record, row))
        self._receivers[identity] = receiver
        if self.draining:
            receiver.stop()
        try:
            await receiver.run(body)
        except OSError as error:
            log.warning("upload could not be written", extra={"fields": {"upload": identity, "error": str(error)}})
            raise storage_problem(error) from error
        finally:
            del self._receivers[identity]
            if spool.digest is not None and len(self._digests) < 10_000:
                self._digests[identity] = (spool.end, spool.digest)
            await run_sync(spool.close)

    @staticmethod
    def _start_digest(row: Row, hashed: int, digest: Any | None) -> Any | None:
        if row["offset"] == 0:
            return hashlib.sha256()
        return digest if hashed == row["offset"] else None

    def _record(self, row: Row, offset: int, *, whole: bool) -> None:
        """Write down what is durable; from here on it is acknowledged."""
        now = time.time()
        if row["length"] is None:
            self._quotas.check(row["token"], 0)
        values: dict[str, Any] = {"offset": offset, "expires": now + self._settings.upload_ttl}
        if whole:
            values |= {"state": "finishing", "length": offset, "expires": now + self._settings.keep_ttl}
        still_receiving = (uploads.c.id == row["id"]) & (uploads.c.state == "receiving")
        with self._database.write() as connection:
            before = connection.execute(sa.select(uploads.c.offset).where(still_receiving)).scalar()
            if before is None:
                raise not_found("upload")
            connection.execute(uploads.update().where(still_receiving).values(values))
            add(connection, "upload_bytes", "", offset - before)

    async def _finished(self, principal: Principal, identity: str) -> Row:
        row = await run_sync(self.get, principal, identity)
        if row["state"] == "finishing":
            await asyncio.wait({self.finish(row)}, timeout=FINISH_PATIENCE)
            row = await run_sync(self.get, principal, identity)
        return row

    def finish(self, row: Row) -> asyncio.Task[None]:
        """Start (or find) the task that takes a complete upload from the spool into the store."""
        task = self._finishers.get(row["id"])
        if task is None:
            digest = self._digests.pop(row["id"], (0, None))
            task = asyncio.ensure_future(run_sync(self._finish, row, digest))
            task.add_done_callback(lambda done: self._after_finish(row["id"], done))
            self._finishers[row["id"]] = task
        return task

    def _after_finish(self, identity: str, task: asyncio.Task[None]) -> None:
        del self._finishers[identity]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("an upload could not be stored yet", extra={"fields": {"upload": identity, "error": str(error)}})

    def _finish(self, row: Row, digest: tuple[int, Any]) -> None:
        path, key = self.path(row["id"]), f"uploads/{row['id']}/0"
        if path.exists():
            whole = digest[1] is not None and digest[0] == row["length"]
            sha256 = digest[1].hexdigest() if whole else file_sha256(path)
        else:  # a crash came between the move and the record
            sha256 = blocks_sha256(self._storage.blocks(key))
        refused = row["announced"] is not None and sha256 != row["announced"]
        if refused:
            path.unlink(missing_ok=True)
            self._storage.delete(f"uploads/{row['id']}")
        elif path.exists():
            self._storage.adopt(path, key)
        values = {"state": "refused" if refused else "ready", "sha256": sha256}
        self._database.execute(uploads.update().where(uploads.c.id == row["id"]).values(values))

    async def delete(self, principal: Principal, identity: str) -> None:
        """Remove an upload and free its space."""
        await run_sync(self.get, principal, identity)
        async with self._turn(identity):
            if (finisher := self._finishers.get(identity)) is not None:
                await asyncio.wait({finisher})
            await run_sync(self.remove, identity)

    def remove(self, identity: str) -> None:
        """Files first, then the row: a crash in between leaves a row that the sweeper takes."""
        self._digests.pop(identity, None)
        self.path(identity).unlink(missing_ok=True)
        self._storage.delete(f"uploads/{identity}")
        self._database.execute(uploads.delete().where(uploads.c.id == identity))

    def expire(self) -> None:
        """Remove uploads that were not touched within their time to live.

        Taking the row first keeps out bytes that arrive at this moment.
        """
        old = uploads.c.expires < time.time()
        for row in self._database.all(sa.select(uploads.c.id).where(old)):
            still_expired = (uploads.c.id == row["id"]) & old
            if self._database.execute(uploads.update().where(still_expired).values(state="refused")):
                log.info("an upload expired", extra={"fields": {"upload": row["id"]}})
                self.remove(row["id"])

    async def recover(self) -> None:
        """After a start: finish what was complete, and clear spool files that belong to nothing."""
        rows = await run_sync(self._database.all, sa.select(uploads).where(uploads.c.state != "refused"))
        for row in rows:
            if row["state"] == "finishing":
                self.finish(row)
            elif row["state"] == "receiving" and row["length"] is None:
                await run_sync(self.remove, row["id"])  # a PUT cannot be resumed
        ids = {row["id"] for row in rows}
        for path in list(self._spool.iterdir()):
            if path.name not in ids:
                path.unlink()

    async def drain(self) -> None:
        """Stop every body under way: each saves what has arrived."""
        self.draining = True
        for receiver in list(self._receivers.values()):
            receiver.stop()

    def _turn(self, identity: str) -> _Turn:
        return _Turn(self, identity)


class _Turn:
    """The right to write one upload.

    Asking for it stops the request that has it, because a client that comes back has given up its earlier request.
    """

    def __init__(self, owner: Uploads, identity: str) -> None:
        self._owner, self._identity = owner, identity

    async def __aenter__(self) -> None:
        lock = self._owner._turns.setdefault(self._identity, asyncio.Lock())
        if (receiver := self._owner._receivers.get(self._identity)) is not None:
            receiver.stop()
        try:
            with anyio.fail_after(TURN_PATIENCE):
                await lock.acquire()
        except TimeoutError:
            raise HTTPProblem(423, "upload.locked", "Another request is still writing this upload.") from None

    async def __aexit__(self, *_: object) -> None:
        lock = self._owner._turns[self._identity]
        lock.release()
        if not lock.locked() and not getattr(lock, "_waiters", None):
            self._owner._turns.pop(self._identity, None)
