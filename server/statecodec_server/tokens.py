"""Bearer tokens, stored as hashes, and short-lived signed links for browser downloads.

A token is `sct_<id>_<secret>` with 256 random bits in the secret, so one SHA-256 is a sufficient hash: there is
nothing to guess. A ticket is an HMAC over (job, token, expiry) and opens the result of that one job.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from .database import Database, tokens
from .problems import HTTPProblem

TOKEN = re.compile(r"sct_([0-9a-z]{8})_([A-Za-z0-9]{20,64})")
ANONYMOUS = "anonymous"
CACHE_SECONDS = 2.0
_ALPHABET = "ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnpqrstuvwxyz23456789"


@dataclass(frozen=True)
class Principal:
    """Who is asking: the id and the name of a token."""

    id: str
    name: str


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


class Tokens:
    """The token table with a short cache, so that polling does not read the database for each request."""

    def __init__(self, database: Database, secret: bytes) -> None:
        self._database, self._secret = database, secret
        self._cache: dict[str, tuple[float, Principal]] = {}

    def create(self, name: str) -> str:
        """A new token under a name of its own; the only time its text is seen. Raises ValueError for a name in use."""
        identity = secrets.token_hex(4)
        text = "".join(secrets.choice(_ALPHABET) for _ in range(43))
        row = {"id": identity, "name": name, "hash": _hash(text), "created": time.time(), "revoked": None}
        try:
            self._database.execute(tokens.insert().values(row))
        except sa.exc.IntegrityError:
            raise ValueError(f"there is a token named {name!r} already") from None
        return f"sct_{identity}_{text}"

    def revoke(self, name: str) -> bool:
        """Make a token useless from now on (other processes notice within the cache time)."""
        statement = tokens.update().where(tokens.c.name == name, tokens.c.revoked.is_(None))
        self._cache.clear()
        return self._database.execute(statement.values(revoked=time.time())) > 0

    def names(self) -> list[str]:
        """The names of all valid tokens."""
        rows = self._database.all(sa.select(tokens.c.name).where(tokens.c.revoked.is_(None)).order_by(tokens.c.created))
        return [row["name"] for row in rows]

    def principal(self, text: str) -> Principal:
        """Who holds this token; raises a 401 problem."""
        key = _hash(text)
        cached = self._cache.get(key)
        if cached is not None and cached[0] > time.monotonic():
            return cached[1]
        match = TOKEN.fullmatch(text)
        row = None
        if match is not None:
            row = self._database.one(
                sa.select(tokens.c.id, tokens.c.name, tokens.c.hash).where(
                    tokens.c.id == match[1], tokens.c.revoked.is_(None)
                )
            )
        if match is None or row is None or not hmac.compare_digest(row["hash"], _hash(match[2])):
            raise unauthorised("auth.invalid", "This token is not valid here.")
        principal = Principal(row["id"], row["name"])
        if len(self._cache) > 10_000:
            self._cache.clear()
        self._cache[key] = (time.monotonic() + CACHE_SECONDS, principal)
        return principal

    def ticket(self, job: str, principal: Principal, seconds: float) -> tuple[str, float]:
        """A link parameter that opens the result of one job for `seconds`, and the time at which it ends."""
        expires = int(time.time() + seconds)
        return f"{principal.id}.{expires}.{self._sign(job, principal.id, expires)}", float(expires)

    def redeem(self, job: str, ticket: str) -> Principal:
        """Who made this ticket; raises a 401 problem when it is not for this job or has expired."""
        match = re.fullmatch(r"([0-9a-z]{1,16})\.([0-9]{1,12})\.([0-9a-f]{64})", ticket)
        if match is None or not hmac.compare_digest(match[3], self._sign(job, match[1], int(match[2]))):
            raise unauthorised("auth.invalid", "This download link is not valid.")
        if int(match[2]) < time.time():
            raise unauthorised("auth.invalid", "This download link has expired; ask for a new one.")
        if match[1] != ANONYMOUS:
            row = self._database.one(sa.select(tokens.c.revoked).where(tokens.c.id == match[1]))
            if row is None or row["revoked"] is not None:
                raise unauthorised("auth.invalid", "The token behind this download link has been revoked.")
        return Principal(match[1], "ticket")

    def _sign(self, job: str, token: str, expires: int) -> str:
        return hmac.new(self._secret, f"{job}\n{token}\n{expires}".encode(), hashlib.sha256).hexdigest()


def unauthorised(code: str, detail: str) -> HTTPProblem:
    """A 401 problem with the challenge that HTTP asks for."""
    return HTTPProblem(401, code, detail, headers={"WWW-Authenticate": 'Bearer realm="statecodec"'})


def server_secret(data: Path) -> bytes:
    """The key that signs download links; made once and kept with mode 0600."""
    path = data / "secret"
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path.read_bytes()
    with os.fdopen(handle, "wb") as file:
        file.write(secrets.token_bytes(32))
        file.flush()
        os.fsync(file.fileno())
    return path.read_bytes()
