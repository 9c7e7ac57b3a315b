"""`statecodec serve`: start the conversion service, when its packages are installed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

Data = Annotated[
    Path | None,
    typer.Option("--data", metavar="DIR", show_default=False, help="Where it keeps things. Default: statecodec-data."),
]
Database = Annotated[
    str | None,
    typer.Option("--db", metavar="URL", show_default=False, help="postgresql://... Default: SQLite files in --data."),
]
Storage = Annotated[
    str | None,
    typer.Option("--storage", metavar="URL", show_default=False, help="s3://bucket/... Default: a folder in --data."),
]
Config = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", exists=True, show_default=False, help="A TOML file of settings."),
]


def load_settings(config: Path | None, **values: Any) -> Any:
    """The settings of the service. Raises typer.BadParameter if it is not installed or refuses them."""
    try:
        from statecodec_server.main import StartRefused, load
        from statecodec_server.settings import CONFIG_VARIABLE
    except ImportError as error:
        raise typer.BadParameter(
            f"the service needs further packages ({error.name}): pip install 'statecodec[server]'"
        ) from None
    if config is not None:
        os.environ[CONFIG_VARIABLE] = str(config)
    try:
        return load(values)
    except StartRefused as error:
        raise typer.BadParameter(str(error)) from None


def run(
    host: Annotated[
        str | None, typer.Option("--host", metavar="ADDRESS", show_default=False, help="Default: 127.0.0.1.")
    ] = None,
    port: Annotated[
        int | None, typer.Option("--port", metavar="N", min=0, max=65535, show_default=False, help="Default: 8321.")
    ] = None,
    data: Data = None,
    database: Database = None,
    storage: Storage = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", metavar="N", min=0, max=64, show_default=False, help="Worker processes. Default: 1."),
    ] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Ask for no token; on a loopback address only.")] = False,
    config: Config = None,
) -> None:
    """Start the conversion service.

    Prints its address, and on the first start a token. Further settings: docs/service.md.
    """
    settings = load_settings(
        config,
        host=host,
        port=port,
        data=data,
        database_url=database,
        storage_url=storage,
        workers=workers,
        auth=False if no_auth else None,
    )
    from statecodec_server.main import serve

    raise typer.Exit(serve(settings))
