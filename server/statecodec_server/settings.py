"""Every setting of the service, from the environment (STATECODEC_SERVER_*), a TOML file, and the command line.

The command line wins over the environment, the environment over the file. Sizes may be written as `20GB` or `512MiB`.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ByteSize, Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

CONFIG_VARIABLE = "STATECODEC_SERVER_CONFIG"


def is_loopback(host: str) -> bool:
    """Whether binding to `host` keeps the service on this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # a name: what it resolves to is not ours to trust
        return False


class Bucket(BaseModel):
    """A place the operator lets jobs read from, under a name that clients use instead of a URL."""

    url: str = Field(description="s3://bucket/prefix, gs://..., az://..., or file:///absolute/folder")
    options: dict[str, str] = Field(default_factory=dict, description="obstore options, such as endpoint or region")
    tokens: list[str] | None = Field(default=None, description="token names that may read it; every token when absent")


def _bucket(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


class Settings(BaseSettings):
    """The whole configuration; `docs/service.md` lists it."""

    model_config = SettingsConfigDict(env_prefix="STATECODEC_SERVER_", env_nested_delimiter="__", extra="forbid")

    # Where it listens.
    host: str = Field(default="127.0.0.1", description="address to bind")
    port: int = Field(default=8321, ge=0, le=65535, description="port to bind; 0 takes any free one")
    public_url: str | None = Field(default=None, description="how clients reach it, when a proxy stands in front")
    hosts: list[str] = Field(default_factory=list, description="further Host headers to answer to; * for any")
    auth: bool = Field(default=True, description="require a bearer token; may be off on a loopback address only")

    # Where it keeps things.
    data: Path = Field(default=Path("statecodec-data"), description="folder for everything it keeps on this machine")
    kernels: Path | None = Field(
        default=None, description="folder of compiled kernels, made at the first start; in `data` if absent"
    )
    database_url: SecretStr | None = Field(
        default=None, description="postgresql://...; SQLite files in the data folder if absent"
    )
    storage_url: str | None = Field(default=None, description="s3://... for objects; a folder in `data` if absent")
    storage_options: dict[str, str] = Field(default_factory=dict, description="obstore options of storage_url")
    buckets: dict[str, Annotated[Bucket, BeforeValidator(_bucket)]] = Field(
        default_factory=dict, description="named places jobs may read inputs from"
    )
    fetch_hosts: list[str] = Field(default_factory=list, description="hosts jobs may fetch https inputs from")

    # Workers.
    workers: int = Field(default=1, ge=0, le=64, description="worker processes started beside the HTTP process")
    worker_name: str = Field(
        default_factory=socket.gethostname, description="stable name of this machine's workers; its host name if absent"
    )
    lease_seconds: float = Field(default=20.0, gt=0, description="a worker silent for so long is dead: its jobs move")
    poll_seconds: float = Field(default=0.5, gt=0, le=10, description="how often workers look for jobs and report")
    drain_seconds: float = Field(default=25.0, ge=0, description="what SIGTERM grants to requests and jobs under way")

    # One job.
    job_seconds: float = Field(default=6 * 3600.0, gt=0, description="wall-clock limit of one conversion")
    job_memory: ByteSize = Field(default=ByteSize(8 << 30), description="memory limit of one conversion")
    job_attempts: int = Field(default=3, ge=1, le=100, description="how often a conversion that crashed is tried")
    job_threads: int = Field(
        default_factory=lambda: max(1, (os.cpu_count() or 2) // 2),
        ge=1,
        le=256,
        description="threads of one conversion; half the cores if absent",
    )
    backend: str = Field(default="statecodec", description="module that does the work; tests put a double here")

    # Limits.
    max_upload: ByteSize = Field(default=ByteSize(200 * 10**9), description="largest single upload")
    max_body: ByteSize = Field(default=ByteSize(1 << 20), description="largest JSON body")
    max_files: int = Field(default=10_000, ge=1, description="files in one directory checkpoint")
    max_uploads: int = Field(default=20_000, ge=1, description="uploads one token may hold")
    max_jobs: int = Field(default=100, ge=1, description="unfinished jobs one token may have")
    token_quota: ByteSize = Field(default=ByteSize(10**12), description="bytes one token may keep here")
    total_quota: ByteSize | None = Field(default=None, description="bytes all tokens together may keep here")
    disk_reserve: ByteSize = Field(default=ByteSize(1 << 30), description="free disk space that is never used up")
    body_timeout: float = Field(default=60.0, gt=0, description="seconds a body may stay silent before it is cut off")
    max_streams: int = Field(default=200, ge=1, description="event streams open at the same time")

    # Time to live, in seconds.
    upload_ttl: float = Field(default=24 * 3600.0, gt=0, description="unfinished uploads, after their last byte")
    keep_ttl: float = Field(default=7 * 24 * 3600.0, gt=0, description="finished uploads, jobs and results")
    sweep_seconds: float = Field(default=30.0, gt=0, description="how often what has expired is looked for")
    ticket_ttl: float = Field(default=600.0, gt=0, description="a download link made for a browser")

    metrics_open: bool | None = Field(default=None, description="/metrics without a token; only on loopback if absent")
    log_level: str = Field(
        default="INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$", description="DEBUG, INFO, WARNING or ERROR"
    )

    @field_validator("storage_url")
    @classmethod
    def _known_scheme(cls, value: str | None) -> str | None:
        if value is not None and "://" not in value:
            raise ValueError(f"storage_url must be a URL such as s3://bucket/prefix, not {value!r}")
        return value

    @property
    def database(self) -> str:
        """SQLAlchemy URL of the service's own tables."""
        if self.database_url is None:
            return f"sqlite:///{self.data.resolve() / 'service.sqlite'}"
        return self.database_url.get_secret_value().replace("postgres://", "postgresql://", 1)

    @property
    def jobs_database(self) -> str:
        """URL of the job engine's tables: a file of their own under SQLite, a schema of their own in Postgres."""
        return f"sqlite:///{self.data.resolve() / 'jobs.sqlite'}" if self.database_url is None else self.database

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        return is_loopback(self.host)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Put the TOML file named by STATECODEC_SERVER_CONFIG last."""
        sources: tuple[PydanticBaseSettingsSource, ...] = (init_settings, env_settings, file_secret_settings)
        named = os.environ.get(CONFIG_VARIABLE)
        if named and not Path(named).is_file():
            raise FileNotFoundError(f"{CONFIG_VARIABLE} names {named}, which is not a file")
        return (*sources, TomlConfigSettingsSource(settings_cls, toml_file=named)) if named else sources
