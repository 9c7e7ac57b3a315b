"""The application factory: nothing is global, so that a test may have two."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.metadata import PackageNotFoundError, version

from anyio.to_thread import run_sync
from fastapi import FastAPI

from . import housekeeping, jobs, operations, problems
from .context import Context
from .database import Database
from .events import Watcher
from .inputs import Inputs
from .metrics import Metrics
from .middleware import Gate
from .quotas import Quotas
from .records import Jobs
from .routes import health, page, results, uploads
from .routes import jobs as job_routes
from .settings import Settings
from .storage import Storage
from .supervisor import Supervisor
from .tokens import Tokens, server_secret
from .uploads import Uploads

log = logging.getLogger("statecodec.server")
DESCRIPTION = """Send a training checkpoint, get it back small, and lose nothing on the way.

Uploads follow [tus 1.0.0](https://tus.io/protocols/resumable-upload) and survive a crash of either side; jobs survive
a crash of the service; results carry their SHA-256. Errors are RFC 9457 problem documents with a stable `code`."""


class DataFolderInUse(RuntimeError):
    """Another process serves this data folder."""


def own_data_folder(settings: Settings) -> int:
    """Make the data folder and lock it for this process; returns the lock's file descriptor.

    Raises DataFolderInUse when another process holds it.
    """
    settings.data.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(settings.data / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise DataFolderInUse(f"another service is using {settings.data}; give this one a data folder") from None
    return handle


def package_version() -> str:
    """The version of the installed package."""
    try:
        return version("statecodec")
    except PackageNotFoundError:
        return "0"


def make_context(settings: Settings) -> Context:
    """Open the database and the storage, and put the parts together."""
    database = Database(settings.database)
    database.migrate()
    jobs.migrate(settings)
    storage = Storage(settings)
    quotas = Quotas(settings, database)
    records = Jobs(settings, database)
    return Context(
        settings=settings,
        database=database,
        storage=storage,
        tokens=Tokens(database, server_secret(settings.data)),
        quotas=quotas,
        uploads=Uploads(settings, database, storage, quotas),
        jobs=records,
        inputs=Inputs(settings, database, records),
        queue=jobs.JobQueue(settings),
        watcher=Watcher(settings, database),
        supervisor=Supervisor(settings),
    )


def _lifespan(here: Context) -> object:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await here.uploads.recover()
        running = (here.supervisor.run(), here.watcher.run(), housekeeping.run(here), _describe_library(here))
        tasks = [asyncio.ensure_future(task) for task in running]
        for task in tasks:
            task.add_done_callback(_complain)
        try:
            yield
        finally:
            await drain(here)
            await here.supervisor.stop()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            here.queue.close()
            here.database.close()

    return lifespan


def _complain(task: asyncio.Task[None]) -> None:
    """None of these may end in an error unnoticed; /readyz shows what is missing then."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("a part of the service has stopped", exc_info=error)


async def _describe_library(here: Context) -> None:
    """Ask early which operations the library has, so that no request has to wait for it."""
    await run_sync(operations.describe, here.settings.backend)


async def drain(here: Context) -> None:
    """Before shutting down: no new job, bodies under way save what has come, event streams end."""
    here.draining = True
    await here.uploads.drain()
    here.watcher.close()


def create_app(settings: Settings, here: Context | None = None) -> FastAPI:
    """An application over a context (made from the settings when not given)."""
    here = make_context(settings) if here is None else here
    metrics = Metrics()
    metrics.watch(here.database, here.quotas, here.jobs)
    lifespan: AbstractAsyncContextManager[None] | object = _lifespan(here)
    app = FastAPI(
        title="statecodec conversion service",
        version=package_version(),
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        lifespan=lifespan,  # type: ignore[arg-type]
    )
    app.state.context, app.state.metrics = here, metrics
    problems.install(app)
    for module in (page, health, uploads, job_routes, results):
        app.include_router(module.router)
    app.add_middleware(Gate, settings=settings, seconds=metrics.seconds)
    return app
