"""The service's own tables, in SQLite or Postgres, and the few ways to read and write them.

The job engine keeps its tables apart (jobs.py). Times are seconds since the epoch; documents are JSON text. On SQLite
a commit is durable when it returns (WAL, synchronous=FULL): an upload's offset is acknowledged only after it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy import BigInteger, Boolean, Column, Float, Integer, Text

metadata = sa.MetaData()

tokens = sa.Table(
    "service_tokens",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("hash", Text, nullable=False),
    Column("created", Float, nullable=False),
    Column("revoked", Float),
)
uploads = sa.Table(
    "service_uploads",
    metadata,
    Column("id", Text, primary_key=True),
    Column("token", Text, nullable=False, index=True),
    Column("name", Text, nullable=False),
    Column("metadata", Text, nullable=False),
    Column("length", BigInteger),  # null while a PUT without Content-Length is under way
    Column("offset", BigInteger, nullable=False),  # acknowledged: on disk, fsynced
    Column("state", Text, nullable=False, index=True),  # receiving | finishing | ready | refused
    Column("announced", Text),  # SHA-256 in hex that the client says the whole has
    Column("sha256", Text),
    Column("created", Float, nullable=False),
    Column("expires", Float, nullable=False, index=True),
)
jobs = sa.Table(
    "service_jobs",
    metadata,
    Column("id", Text, primary_key=True),
    Column("token", Text, nullable=False, index=True),
    Column("operation", Text, nullable=False),
    Column("request", Text, nullable=False),
    Column("fingerprint", Text, nullable=False),
    Column("idempotency_key", Text),
    Column("state", Text, nullable=False, index=True),  # queued | running | succeeded | failed | cancelled
    Column("cancel", Boolean, nullable=False, default=False),
    Column("attempt", Integer, nullable=False, default=0),
    Column("crashes", Integer, nullable=False, default=0),
    Column("owner", Text),
    Column("stage", Text, nullable=False, default="queued"),
    Column("done", BigInteger, nullable=False, default=0),
    Column("total", BigInteger, nullable=False, default=0),
    Column("rate", Float, nullable=False, default=0.0),
    Column("created", Float, nullable=False),
    Column("started", Float),
    Column("finished", Float),
    Column("expires", Float, nullable=False, index=True),
    Column("bytes_in", BigInteger, nullable=False, default=0),
    Column("bytes_out", BigInteger, nullable=False, default=0),
    Column("error", Text),
    Column("result", Text),
    sa.UniqueConstraint("token", "idempotency_key"),
)
workers = sa.Table(
    "service_workers",
    metadata,
    Column("id", Text, primary_key=True),
    Column("pid", Integer, nullable=False),
    Column("started", Float, nullable=False),
    Column("seen", Float, nullable=False),
)
counters = sa.Table(
    "service_counters",
    metadata,
    Column("metric", Text, primary_key=True),
    Column("labels", Text, primary_key=True),
    Column("value", Float, nullable=False),
)
version = sa.Table("service_version", metadata, Column("version", Integer, primary_key=True))

SCHEMA_VERSION = 1
_LOCK_KEY = 0x5C0DEC


class Database:
    """An engine and short transactions. Every method blocks: call them from threads, not from the event loop."""

    def __init__(self, url: str, *, pool_size: int = 8) -> None:
        self.sqlite = url.startswith("sqlite")
        if not self.sqlite:
            url = url.replace("postgresql://", "postgresql+psycopg://", 1)
        options: dict[str, Any] = {"pool_size": pool_size, "max_overflow": 8, "pool_timeout": 20}
        if self.sqlite:
            options["connect_args"] = {"timeout": 30, "check_same_thread": False}
        else:
            options["pool_pre_ping"] = True
        self.engine = sa.create_engine(url, **options)
        # SQLite has one writer at a time; queueing our own threads here is fairer than its busy loop.
        self._writer = threading.Lock() if self.sqlite else None
        if self.sqlite:
            sa.event.listen(self.engine, "connect", _prepare_sqlite)
            sa.event.listen(self.engine, "begin", _begin_sqlite)

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """One transaction that is durable when the block ends."""
        if self._writer is None:
            with self.engine.begin() as connection:
                yield connection
            return
        with self._writer, self.engine.begin() as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A consistent read that blocks no other connection."""
        with self.engine.connect().execution_options(read_only=True) as connection:
            yield connection

    def one(self, statement: sa.Select[Any]) -> Mapping[str, Any] | None:
        """The first row of a query, or None."""
        with self.read() as connection:
            row = connection.execute(statement).mappings().first()
        return None if row is None else dict(row)

    def all(self, statement: sa.Select[Any]) -> list[Mapping[str, Any]]:
        """Every row of a query."""
        with self.read() as connection:
            return [dict(row) for row in connection.execute(statement).mappings()]

    def execute(self, statement: Any) -> int:
        """One statement in a transaction of its own; how many rows it touched."""
        with self.write() as connection:
            return int(connection.execute(statement).rowcount)

    def migrate(self) -> None:
        """Create the tables. Raises RuntimeError for a database that another version of the service has written."""
        with self.write() as connection:
            if not self.sqlite:
                connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK_KEY})
            metadata.create_all(connection)
            current = connection.execute(sa.select(version.c.version)).scalar()
            if current is None:
                connection.execute(version.insert().values(version=SCHEMA_VERSION))
            elif current != SCHEMA_VERSION:
                raise RuntimeError(f"the database has schema version {current}, this service needs {SCHEMA_VERSION}")

    def ping(self) -> None:
        """Raise when the database cannot be reached or has no tables."""
        with self.read() as connection:
            connection.execute(sa.select(version.c.version)).scalar_one()

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()


def _prepare_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # we write BEGIN ourselves, see _begin_sqlite
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=30000", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: sa.Connection) -> None:
    read_only = connection.get_execution_options().get("read_only", False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


def add(connection: sa.Connection, metric: str, labels: str, value: float) -> None:
    """Increase a persistent counter inside the caller's transaction."""
    where = (counters.c.metric == metric) & (counters.c.labels == labels)
    touched = connection.execute(counters.update().where(where).values(value=counters.c.value + value)).rowcount
    if touched:
        return
    if connection.dialect.name == "sqlite":
        from sqlalchemy.dialects.sqlite import insert as upsert
    else:
        from sqlalchemy.dialects.postgresql import insert as upsert  # type: ignore[assignment]
    statement = upsert(counters).values(metric=metric, labels=labels, value=value)
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=["metric", "labels"], set_={"value": counters.c.value + statement.excluded.value}
        )
    )
