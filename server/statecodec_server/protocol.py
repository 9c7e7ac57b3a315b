"""HTTP/1.1 as uvicorn and h11 speak it, except that what cannot be parsed gets a problem document."""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from .problems import HEAD_BYTES, HTTPProblem, head_too_long

_DISCARDED = 1 << 20  # bytes read and dropped after a refusal, so that the client sees the answer and not a reset
_LINGER = 1.0


class Protocol(H11Protocol):
    """One connection."""

    _refused: int | None = None  # bytes dropped since this connection was refused

    def data_received(self, data: bytes) -> None:
        """Feed the parser; after a refusal only take the bytes off the wire."""
        if self._refused is None:
            super().data_received(data)
            return
        self._refused += len(data)
        if self._refused > _DISCARDED:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Refuse what could not be parsed, end our side, and close once the client has had time to read it."""
        long = len(self.conn.trailing_data[0]) > HEAD_BYTES
        problem = head_too_long() if long else HTTPProblem(400, "usage", "That is not an HTTP/1.1 request.")
        response = problem.response()
        reason = response.status_code, problem.document()["title"]
        head = [f"HTTP/1.1 {reason[0]} {reason[1]}".encode()]
        head += [name + b": " + value for name, value in (*response.raw_headers, (b"connection", b"close"))]
        self.transport.write(b"\r\n".join(head) + b"\r\n\r\n" + bytes(response.body))
        self._refused = 0
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(_LINGER, self.transport.close)

    def eof_received(self) -> Any:
        """The client has read the refusal, or has given up."""
        return super().eof_received() if self._refused is None else None
