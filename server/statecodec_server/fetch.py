"""Fetching an https input from a host the operator has allowed, and from nowhere else.

The name is resolved once, every address it has must be a public one, and the connection goes to a checked address,
so that a name cannot change its mind between check and use. Redirects, credentials and other ports are refused.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import urllib.parse
from collections.abc import Callable, Sequence
from pathlib import Path

from .problems import HTTPProblem
from .storage import BLOCK

TIMEOUT = 30.0
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_NAT64_LOCAL = ipaddress.ip_network("64:ff9b:1::/48")
Resolve = Callable[[str], Sequence[str]]


def is_public(text: str) -> bool:
    """Whether an address is one of the public internet, also when it hides an IPv4 address inside an IPv6 one."""
    address = ipaddress.ip_address(text.split("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if address in _NAT64_LOCAL:
            return False
    return address.is_global and not address.is_multicast


def allowed_host_and_path(url: str, allowed: Sequence[str]) -> tuple[str, str]:
    """(host, path with query) of a URL that may be fetched; raises a 422 problem for every other."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError:
        raise HTTPProblem(422, "usage", "That is not a URL.") from None
    host = (parts.hostname or "").lower()
    if not allowed:
        raise HTTPProblem(422, "usage", "This service fetches nothing from URLs. Upload the file, or use a bucket.")
    if parts.scheme != "https" or parts.username is not None or port not in (None, 443) or host not in allowed:
        raise HTTPProblem(422, "usage", "Only plain https URLs of these hosts are fetched: " + ", ".join(allowed))
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if any(ord(letter) <= 32 or ord(letter) >= 127 for letter in target):
        raise HTTPProblem(422, "usage", "The URL has characters that must be percent-encoded.")
    return host, target


def resolve(host: str) -> list[str]:
    """Every address of a name. Raises a 422 problem when it has none."""
    try:
        return sorted({str(info[4][0]) for info in socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)})
    except OSError:
        raise HTTPProblem(422, "job.input", f"The name {host!r} cannot be resolved.") from None


class _Pinned(http.client.HTTPSConnection):
    """Speaks TLS with `host`, but connects to the address that was checked."""

    def __init__(self, host: str, address: str, context: ssl.SSLContext) -> None:
        super().__init__(host, 443, timeout=TIMEOUT, context=context)
        self._address, self._tls = address, context

    def connect(self) -> None:
        """Connect to the pinned address, whatever the name resolves to now."""
        plain = socket.create_connection((self._address, 443), TIMEOUT)
        self.sock = self._tls.wrap_socket(plain, server_hostname=self.host)


def download(url: str, target: Path, *, allowed: Sequence[str], limit: int, resolver: Resolve = resolve) -> None:
    """Fetch an allowed URL into a file of at most `limit` bytes; raises an HTTPProblem."""
    host, path = allowed_host_and_path(url, allowed)
    addresses = resolver(host)
    if not addresses or not all(is_public(address) for address in addresses):
        raise HTTPProblem(422, "job.input", f"The name {host!r} leads to an address that is not public.")
    connection = _Pinned(host, addresses[0], ssl.create_default_context())
    try:
        connection.request("GET", path, headers={"Accept-Encoding": "identity", "User-Agent": "statecodec-server"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise HTTPProblem(422, "job.input", f"{host} answered {answer.status}; redirects are not followed.")
        _copy(answer, target, limit)
    except (OSError, http.client.HTTPException) as error:
        raise HTTPProblem(422, "job.input", f"{host} could not be read: {type(error).__name__}.") from error
    finally:
        connection.close()


def _copy(answer: http.client.HTTPResponse, target: Path, limit: int) -> None:
    announced, received = answer.length, 0
    with target.open("wb") as file:
        while block := answer.read(BLOCK):
            received += len(block)
            if received > limit:
                raise HTTPProblem(422, "job.input", f"The file is larger than {limit:,} bytes.")
            file.write(block)
    if announced is not None and received != announced:
        raise HTTPProblem(422, "job.input", "The file ended early.")
