"""`statecodec-server`: start the service, or look after its tokens."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
from typing import Any

import uvicorn
from pydantic import ValidationError

from . import app as application
from . import logs
from .context import Context
from .database import Database
from .problems import HEAD_BYTES
from .protocol import Protocol
from .settings import CONFIG_VARIABLE, Settings
from .tokens import Tokens, server_secret

log = logging.getLogger("statecodec.server")
FIRST_TOKEN = "first"


class StartRefused(Exception):
    """The service will not start like this; the message says what to change."""


class Server(uvicorn.Server):
    """uvicorn, which on SIGTERM first lets uploads save what they have and event streams end."""

    def __init__(self, config: uvicorn.Config, here: Context, announce: str) -> None:
        super().__init__(config)
        self._here, self._announce = here, announce
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then say where."""
        await super().startup(sockets)
        if self.started:
            print(self._announce, flush=True)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Called in the main thread by the signal: drain on the loop, and let uvicorn stop accepting."""
        super().handle_exit(sig, frame)
        if self._draining is None:
            log.info("draining", extra={"fields": {"signal": signal.Signals(sig).name}})
            self._draining = asyncio.get_event_loop().create_task(application.drain(self._here))


def check(settings: Settings) -> None:
    """Refuse what would be unsafe; raises StartRefused."""
    if not settings.auth and not settings.loopback:
        raise StartRefused(
            f"refusing to listen on {settings.host} without tokens: drop --no-auth, or bind to 127.0.0.1"
        )


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host.strip("[]"), settings.port))
    except OSError as error:
        raise StartRefused(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}") from None
    listener.set_inheritable(False)
    return listener


def _announcement(settings: Settings, here: Context, port: int) -> str:
    """What `serve` prints: the address, and on the first start the first token."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    shown = "localhost" if settings.host in ("0.0.0.0", "::") else host
    url = settings.public_url or f"http://{shown}:{port}"
    lines = [f"statecodec is serving {url}"]
    if not settings.auth:
        lines.append("without tokens: every program on this machine may use it")
    elif not here.tokens.names():
        token = here.tokens.create(FIRST_TOKEN)
        lines += [
            f"token     {token}",
            "          (shown this once; make others with `statecodec-server token add NAME`)",
            f"open      {url}/#token={token}",
        ]
    else:
        lines.append("token     as before; another is made with `statecodec-server token add NAME`")
    if not settings.loopback:
        lines.append("reachable from outside this machine: put TLS in front of it")
    return "\n".join(lines)


def serve(settings: Settings) -> int:
    """Run the service until it is told to stop; the exit status."""
    try:
        check(settings)
        lock = application.own_data_folder(settings)
        listener = _listen(settings)
    except (StartRefused, application.DataFolderInUse) as error:
        print(f"statecodec-server: {error}", file=sys.stderr)
        return 1
    logs.configure(settings.log_level)
    here = application.make_context(settings)
    config = uvicorn.Config(
        application.create_app(settings, here),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=max(1, int(settings.drain_seconds)),
        h11_max_incomplete_event_size=HEAD_BYTES,
        http=Protocol,
        ws="none",
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn raises the signal again once it has shut down in order
    Server(config, here, _announcement(settings, here, listener.getsockname()[1])).run(sockets=[listener])
    os.close(lock)
    return 0


def _tokens(settings: Settings) -> Tokens:
    settings.data.mkdir(parents=True, exist_ok=True, mode=0o700)
    database = Database(settings.database, pool_size=1)
    database.migrate()
    return Tokens(database, server_secret(settings.data))


def manage_tokens(settings: Settings, action: str, name: str | None) -> int:
    """token list | add NAME | revoke NAME; the exit status."""
    if action != "add" and settings.database_url is None and not settings.data.is_dir():
        print(f"statecodec-server: no service has kept anything in {settings.data}", file=sys.stderr)
        return 1
    tokens = _tokens(settings)
    if action == "list":
        print("\n".join(tokens.names()))
        return 0
    if name is None:
        print(f"statecodec-server: token {action} needs a name", file=sys.stderr)
        return 2
    if action == "revoke":
        revoked = tokens.revoke(name)
        print(f"{name} is revoked" if revoked else f"there is no token named {name!r}", file=sys.stderr)
        return 0 if revoked else 1
    try:
        print(tokens.create(name))
    except ValueError as error:
        print(f"statecodec-server: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="statecodec-server", description="Every setting can also be given as STATECODEC_SERVER_NAME or in a file."
    )
    parser.add_argument("--config", help="a TOML file of settings")
    parser.add_argument("--host", help="address to bind (127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to bind (8321)")
    parser.add_argument("--data", help="folder for everything the service keeps (statecodec-data)")
    parser.add_argument("--db", dest="database_url", help="postgresql://... (SQLite files in the data folder)")
    parser.add_argument("--storage", dest="storage_url", help="s3://... (a folder in the data folder)")
    parser.add_argument("--workers", type=int, help="worker processes (1)")
    parser.add_argument("--no-auth", dest="auth", action="store_false", default=None, help="no tokens (loopback only)")
    commands = parser.add_subparsers(dest="command")
    token = commands.add_parser("token", help="look after the bearer tokens")
    token.add_argument("action", choices=("list", "add", "revoke"))
    token.add_argument("name", nargs="?")
    worker = commands.add_parser("worker", help="run one worker for a service on another machine")
    worker.add_argument("--index", type=int, default=0, help="number of this worker on this machine")
    return parser


def load(values: dict[str, Any]) -> Settings:
    """Settings from the command line over the environment over the file; raises StartRefused."""
    if values.pop("config", None) is not None:
        raise AssertionError("the config file is named in the environment by now")
    try:
        return Settings(**{key: value for key, value in values.items() if value is not None})
    except (ValidationError, FileNotFoundError, ValueError) as error:
        raise StartRefused(str(error)) from None


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    settings_given = vars(_parser().parse_args(arguments))
    command, config = settings_given.pop("command"), settings_given.pop("config")
    extra = {key: settings_given.pop(key) for key in ("action", "name", "index") if key in settings_given}
    if config is not None:
        os.environ[CONFIG_VARIABLE] = config
    try:
        settings = load(settings_given)
    except StartRefused as error:
        print(f"statecodec-server: {error}", file=sys.stderr)
        sys.exit(2)
    if command == "token":
        sys.exit(manage_tokens(settings, extra["action"], extra["name"]))
    if command == "worker":
        from .worker import run

        run(settings, extra["index"], supervised=False)
    sys.exit(serve(settings))


if __name__ == "__main__":
    main()
