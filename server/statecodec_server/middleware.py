"""What every request passes: an id and a log line, the right host and origin, security headers, bounded waiting."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
import urllib.parse
from typing import Any

from prometheus_client import Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import logs
from .problems import HEAD_BYTES, HTTPProblem, head_too_long
from .settings import Settings, is_loopback

log = logging.getLogger("statecodec.server.access")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
# Everywhere else HEAD is GET without its body (RFC 9110, 9.1): uvicorn drops the body by the request's own method.
_OWN_HEAD = re.compile(r"/v1/uploads/.|/v1/jobs/[^/]+/(result|files|tensors|events)")
_QUIET = ("/livez", "/readyz", "/metrics")
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "X-Frame-Options": "DENY",
}


def _length(headers: Headers) -> int:
    text = headers.get("content-length", "0")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0


def _head_bytes(scope: Scope) -> int:
    line = len(scope["raw_path"]) + len(scope["query_string"])
    return line + sum(len(name) + len(value) + 4 for name, value in scope["headers"])


def _encoded(headers: Headers) -> bool:
    """Whether a body arrives compressed: it would be stored, or parsed, as if it were the file itself."""
    fields = headers.getlist("content-encoding")
    return any(part.strip().lower() not in ("", "identity") for field in fields for part in field.split(","))


class Gate:
    """The outermost layer of the application, in plain ASGI so that bodies stream through untouched."""

    def __init__(self, app: ASGIApp, settings: Settings, seconds: Histogram) -> None:
        self.app, self._settings, self._seconds = app, settings, seconds
        self._hosts = {host.lower() for host in settings.hosts}
        if settings.public_url:
            self._hosts.add((urllib.parse.urlsplit(settings.public_url).hostname or "").lower())
        if settings.host not in ("0.0.0.0", "::"):
            self._hosts.add(settings.host.lower())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["method"] == "HEAD" and not _OWN_HEAD.match(scope["path"]):
            scope = {**scope, "method": "GET"}
        headers = Headers(scope=scope)
        asked = headers.get("x-request-id", "")
        identity = asked if _REQUEST_ID.fullmatch(asked) else secrets.token_hex(8)
        logs.request_id.set(identity)
        started, status = time.perf_counter(), [500]

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
                out = MutableHeaders(scope=message)
                out["X-Request-Id"] = identity
                for name, value in SECURITY_HEADERS.items():
                    out.setdefault(name, value)
                if scope["path"].startswith("/v1/uploads"):
                    out.setdefault("Tus-Resumable", "1.0.0")
            await send(message)

        try:
            refusal = self._refusal(scope, headers)
            if refusal is not None:
                await refusal.response()(scope, receive, answer)
            else:
                await self.app(scope, self._patient(scope, receive), answer)
        finally:
            self._note(scope, status[0], time.perf_counter() - started)

    def _refusal(self, scope: Scope, headers: Headers) -> HTTPProblem | None:
        if _head_bytes(scope) > HEAD_BYTES:
            return head_too_long()
        if not self._known_host(headers.get("host", "")):
            return HTTPProblem(
                403, "auth.origin", "This service does not answer to that Host; see the setting `hosts`."
            )
        origin = headers.get("origin")
        if origin is not None and not self._same_origin(origin, headers.get("host", "")):
            return HTTPProblem(403, "auth.origin", "Pages of other sites may not use this service.")
        if not scope["path"].startswith("/v1/uploads") and _length(headers) > self._settings.max_body:
            return HTTPProblem(413, "body.size", f"The largest body here is {int(self._settings.max_body):,} bytes.")
        if _encoded(headers):
            text = "Send the body as it is: this service takes no Content-Encoding."
            return HTTPProblem(415, "body.type", text, headers={"Accept-Encoding": "identity"})
        method = headers.get("x-http-method-override", "").upper()
        if scope["method"] == "POST" and method in ("PATCH", "DELETE") and scope["path"].startswith("/v1/uploads/"):
            scope["method"] = method
        return None

    def _known_host(self, host: str) -> bool:
        """Only names we know: a page that rebinds its own name to our address must not get through."""
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        name = name.strip("[]").lower()
        return "*" in self._hosts or name in self._hosts or (self._settings.loopback and is_loopback(name))

    def _same_origin(self, origin: str, host: str) -> bool:
        parts = urllib.parse.urlsplit(origin)
        public = self._settings.public_url
        if public is not None and origin == "{0.scheme}://{0.netloc}".format(urllib.parse.urlsplit(public)):
            return True
        return parts.scheme in ("http", "https") and parts.netloc.lower() == host.lower()

    def _patient(self, scope: Scope, receive: Receive) -> Receive:
        """Bodies must be short and arrive without long silences; uploads have limits of their own."""
        if scope["path"].startswith("/v1/uploads") or scope["method"] in ("GET", "HEAD"):
            return receive
        done, received = False, 0

        async def patient() -> Message:
            nonlocal done, received
            if done:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self._settings.body_timeout)
            except asyncio.TimeoutError:
                return {"type": "http.disconnect"}
            done = not message.get("more_body", False)
            received += len(message.get("body", b""))
            if received > self._settings.max_body:
                raise HTTPException(413, f"The largest body here is {int(self._settings.max_body):,} bytes.")
            return message

        return patient

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route: Any = scope.get("route")
        template = getattr(route, "path", "other")
        self._seconds.labels(scope["method"], template, f"{status // 100}xx").observe(seconds)
        fields = {"method": scope["method"], "path": scope["path"], "status": status, "seconds": round(seconds, 4)}
        level = (
            logging.DEBUG if scope["path"] in _QUIET or (status < 400 and scope["method"] == "GET") else logging.INFO
        )
        log.log(level, "%s %s %d", scope["method"], scope["path"], status, extra={"fields": fields})
