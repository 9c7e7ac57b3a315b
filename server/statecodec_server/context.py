"""What the routes share, made once per application, and how a route learns who is asking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from anyio.to_thread import run_sync
from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from .database import Database
from .events import Watcher
from .inputs import Inputs
from .jobs import JobQueue
from .quotas import Quotas
from .records import Jobs
from .settings import Settings
from .storage import Storage
from .supervisor import Supervisor
from .tokens import ANONYMOUS, Principal, Tokens, unauthorised
from .uploads import Uploads


@dataclass
class Context:
    """The parts of the HTTP process."""

    settings: Settings
    database: Database
    storage: Storage
    tokens: Tokens
    quotas: Quotas
    uploads: Uploads
    jobs: Jobs
    inputs: Inputs
    queue: JobQueue
    watcher: Watcher
    supervisor: Supervisor
    draining: bool = False


def context(request: Request) -> Context:
    """The context of the application that serves this request."""
    parts: Context = request.app.state.context
    return parts


bearer = HTTPBearer(auto_error=False, description="A token made by `statecodec-server token add NAME`.")
Credentials = Annotated[HTTPAuthorizationCredentials | None, Security(bearer)]


async def principal(request: Request, credentials: Credentials) -> Principal:
    """Who is asking; raises 401."""
    here = context(request)
    if credentials is not None:
        return await run_sync(here.tokens.principal, credentials.credentials)
    if not here.settings.auth:
        return Principal(ANONYMOUS, ANONYMOUS)
    raise unauthorised("auth.missing", "This needs a bearer token: Authorization: Bearer sct_...")


async def downloader(request: Request, credentials: Credentials, job: str, ticket: str | None = None) -> Principal:
    """Who is asking for a result: a token, or a link made for this job."""
    if ticket is not None and credentials is None:
        return await run_sync(context(request).tokens.redeem, job, ticket)
    return await principal(request, credentials)


Here = Annotated[Context, Depends(context)]
Who = Annotated[Principal, Depends(principal)]
Downloader = Annotated[Principal, Depends(downloader)]
