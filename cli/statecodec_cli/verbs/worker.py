"""`statecodec worker`: one more worker for a service that runs elsewhere."""

from __future__ import annotations

from typing import Annotated

import typer

from statecodec_cli.verbs import serve


def run(
    database: Annotated[
        str | None,
        typer.Option("--db", metavar="URL", show_default=False, help="The service's database: postgresql://..."),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option("--storage", metavar="URL", show_default=False, help="The service's storage: s3://bucket/..."),
    ] = None,
    data: serve.Data = None,
    index: Annotated[
        int, typer.Option("--index", metavar="N", min=0, help="Number of this worker on this machine.")
    ] = 0,
    config: serve.Config = None,
) -> None:
    """Work for a service on another machine.

    Takes jobs from the shared database until it is told to stop. Give each worker of a machine its own --index.
    """
    settings = serve.load_settings(config, data=data, database_url=database, storage_url=storage)
    from statecodec_server.worker import run as work

    work(settings, index, supervised=False)
