"""For operators: is it alive, is it ready, and what has it done."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from typing import Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from ..context import Context, Here, bearer, principal

router = APIRouter(tags=["operation"])
CHECK_SECONDS = 5.0


@router.get("/livez")
async def livez() -> dict[str, str]:
    """200 while the process answers at all."""
    return {"status": "ok"}


def _disk(here: Context) -> str:
    free = shutil.disk_usage(here.settings.data).free
    if free < here.settings.disk_reserve:
        raise RuntimeError(f"{free:,} bytes free, {int(here.settings.disk_reserve):,} are kept in reserve")
    return f"{free:,} bytes free"


def _database(here: Context) -> str:
    here.database.ping()
    here.queue.ping()
    return "reachable"


def _storage(here: Context) -> str:
    here.storage.check()
    return "reachable"


def _workers(here: Context) -> str:
    alive = here.jobs.alive()
    if not alive:
        raise RuntimeError("no worker has been heard of (the first start compiles for about half a minute)")
    return f"{len(alive)} alive"


CHECKS: dict[str, Callable[[Context], str]] = {
    "disk": _disk,
    "database": _database,
    "storage": _storage,
    "workers": _workers,
}


async def _answer(here: Context, check: Callable[[Context], str]) -> tuple[bool, str]:
    try:
        return True, await asyncio.wait_for(run_sync(check, here), CHECK_SECONDS)
    except asyncio.TimeoutError:
        return False, "no answer in time"
    except Exception as error:  # whatever it is, the check has failed and the answer says so
        return False, str(error)[:200] or type(error).__name__


@router.get("/readyz", responses={503: {"description": "not ready; the body says why"}})
async def readyz(here: Here) -> JSONResponse:
    """200 when uploads and jobs would succeed: disk, database, storage and workers, and not shutting down."""
    results = await asyncio.gather(*(_answer(here, check) for check in CHECKS.values()))
    checks: dict[str, Any] = {
        name: {"ok": good, "detail": text} for name, (good, text) in zip(CHECKS, results, strict=True)
    }
    checks["draining"] = {"ok": not here.draining, "detail": "shutting down" if here.draining else "no"}
    ready = all(check["ok"] for check in checks.values())
    return JSONResponse({"status": "ok" if ready else "not ready", "checks": checks}, 200 if ready else 503)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request, here: Here) -> Response:
    """Prometheus metrics; needs a token when the service is reachable from outside."""
    is_open = here.settings.loopback if here.settings.metrics_open is None else here.settings.metrics_open
    if not is_open:
        await principal(request, await bearer(request))
    text = await run_sync(request.app.state.metrics.render)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
