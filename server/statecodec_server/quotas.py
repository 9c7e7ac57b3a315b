"""How much may still be stored: per token, in total, and on the disk itself."""

from __future__ import annotations

import shutil
import time

import sqlalchemy as sa

from .database import Database, jobs, uploads
from .problems import HTTPProblem
from .settings import Settings

_HELD = sa.func.coalesce(sa.func.sum(sa.func.coalesce(uploads.c.length, uploads.c.offset)), 0)
_MADE = sa.func.coalesce(sa.func.sum(jobs.c.bytes_out), 0)
_AWAITED = sa.func.coalesce(sa.func.sum(uploads.c.length - uploads.c.offset), 0)
_TTL = 1.0


class Quotas:
    """Reads what is used; an unfinished upload counts with its full announced length."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings, self._database = settings, database
        self._free: tuple[float, int] = (0.0, 0)

    def free_disk(self) -> int:
        """Bytes the data folder's disk can still take, above the reserve."""
        if self._free[0] < time.monotonic():
            free = shutil.disk_usage(self._settings.data).free - self._settings.disk_reserve
            self._free = (time.monotonic() + _TTL, free)
        return self._free[1]

    def used(self, token: str | None = None) -> int:
        """Bytes stored for one token, or for all."""
        held, results = sa.select(_HELD).where(uploads.c.state != "refused"), sa.select(_MADE)
        if token is not None:
            held, results = held.where(uploads.c.token == token), results.where(jobs.c.token == token)
        with self._database.read() as connection:
            return int(connection.execute(held).scalar_one()) + int(connection.execute(results).scalar_one())

    def remaining(self, token: str) -> int:
        """Bytes this token may still store; may be negative."""
        left = self._settings.token_quota - self.used(token)
        if self._settings.total_quota is not None:
            left = min(left, self._settings.total_quota - self.used())
        return left

    def check(self, token: str, nbytes: int, *, awaited: bool = True) -> None:
        """Raises a 507 problem when `nbytes` more cannot be kept.

        `awaited`: what open uploads will still send counts as used.
        """
        left = self.remaining(token)
        if nbytes > left:
            raise HTTPProblem(
                507,
                "storage.quota",
                f"{nbytes:,} bytes asked for, {max(left, 0):,} left of the quota. Delete old uploads and jobs.",
                remaining=max(left, 0),
            )
        free = self.free_disk()
        if awaited:
            statement = sa.select(_AWAITED).where(uploads.c.state == "receiving")
            with self._database.read() as connection:
                free -= int(connection.execute(statement).scalar_one())
        if nbytes > free:
            raise HTTPProblem(
                507, "storage.full", f"{nbytes:,} bytes asked for, {max(free, 0):,} left on the disk of this service."
            )
