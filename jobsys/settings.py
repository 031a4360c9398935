"""Every environment variable: its type, its default, and one line of help. Nothing else reads the environment. What has `repr=False` is a
secret, and hidden wherever it would come out (see secrecy.py).

`Settings()` reads the process's environment and `.env` in the current directory; keyword arguments win over both, and so
a test says `Settings(port=0)`. The names are those of the variables in lower case.
"""

from __future__ import annotations

import ipaddress
import re
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from jobsys.errors import SettingsError
from jobsys.outgoing import names_private_address

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DEFAULT_PORTS = {"http:": ":80", "https": ":443"}  # which browsers leave out
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def seconds(value: Any) -> float:
    """A duration in seconds, from `500ms`, `5s`, `10m`, `2h`, `1d`, or a number of seconds.

    Raises ValueError when it is none of these, or negative, or not finite.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?\s*", str(value))
    if isinstance(value, bool) or match is None:
        raise ValueError(f'"{value}" is not a duration such as 500ms, 5s, 10m, 2h or a number of seconds')
    return float(match[1]) * _UNITS[match[2] or "s"]


def rate(value: Any) -> tuple[int, float]:
    """`n/period` as (n, seconds): `1/5s`, `600/minute`, `10/1m`; `0` means no limit and is (0, 0.0)."""
    text = str(value).strip()
    if text == "0":
        return (0, 0.0)
    named = {"second": "1s", "minute": "1m", "hour": "1h", "day": "1d"}
    match = re.fullmatch(r"(\d{1,9})\s*/\s*(.+)", text)
    if match is None or int(match[1]) == 0:
        raise ValueError(f'"{value}" is not a rate such as 1/5s or 600/minute, nor 0 for no limit')
    period = seconds(named.get(match[2].strip(), match[2]))
    if period <= 0:
        raise ValueError(f'the period in "{value}" must be longer than nothing')
    return (int(match[1]), period)


def is_loopback(host: str) -> bool:
    """Whether `host`, an address or a name, is this machine as only it can reach itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() in LOOPBACK


def size(value: Any) -> int:
    """A number of bytes, from `1048576`, `512KiB` or `1MiB`. Raises ValueError when it is none."""
    match = re.fullmatch(r"\s*(\d{1,12})\s*(KiB|MiB)?\s*", str(value), re.IGNORECASE)
    if isinstance(value, bool) or match is None:
        raise ValueError(f'"{value}" is not a size such as 512KiB, 1MiB or a number of bytes')
    return int(match[1]) * {"": 1, "kib": 1024, "mib": 1024 * 1024}[(match[2] or "").lower()]


Size = Annotated[int, BeforeValidator(size)]
Duration = Annotated[float, BeforeValidator(seconds)]
Rate = Annotated[tuple[int, float], NoDecode, BeforeValidator(lambda value: value if isinstance(value, tuple) else rate(value))]
Count = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=1, le=65535)]


class Settings(BaseSettings):
    """The configuration of one installation. Frozen; made once per process and passed to whatever needs it."""

    model_config = SettingsConfigDict(
        env_file=".env", env_file_encoding="utf-8", env_ignore_empty=True, extra="ignore", frozen=True, hide_input_in_errors=True
    )

    host: str = Field("127.0.0.1", description="Address the web server listens on.")
    port: Port = Field(3000, description="Port the web server listens on.")
    database_url: str | None = Field(None, description="PostgreSQL to use. Unset: the one `bin/dev` keeps under DATA_DIR.")
    data_dir: Path = Field(Path("var"), description="Where `bin/dev` keeps its database, mail and state.")
    output_dir: Path = Field(Path("output"), description="Where CSV_EXPORT writes its files.")

    smtp_host: str | None = Field(None, description="Mail server. Unset: the mail catcher of `bin/dev` on this machine.")
    smtp_port: Port = Field(1025, description="Port of the mail server.")
    smtp_user: str | None = Field(None, description="User name at the mail server.")
    smtp_password: str | None = Field(None, repr=False, description="Password at the mail server.")
    smtp_tls: str | None = Field(
        None,
        description="`starttls`, `tls` or `none`; certificates are verified. Unset: `starttls`, but `none` for a server on this machine.",
    )
    mail_from: str = Field("jobsys@localhost", description="Sender of every mail.")

    admin_user: str | None = Field(None, description="User name for `/admin/*` (HTTP Basic).")
    admin_pass: str | None = Field(None, repr=False, description="Password for `/admin/*`.")
    admin_password: str | None = Field(
        None, repr=False, description="Synonym of ADMIN_PASS; the user is then `admin` unless ADMIN_USER is set."
    )
    viewer_user: str | None = Field(None, description="User name of one who may look at `/admin/*`, and change nothing.")
    viewer_pass: str | None = Field(None, repr=False, description="That user's password. This and ADMIN_PASS may be argon2 hashes.")
    allow_insecure: bool = Field(
        False, description="`1` permits an API without credentials beyond loopback, and to be called by any host name."
    )
    jwt_secret: str | None = Field(
        None, repr=False, description="Key of bearer tokens, at least 32 bytes. Set: the API wants a token. Unset: it is open."
    )
    jwt_secret_previous: str | None = Field(None, repr=False, description="The key before that; its tokens still count.")
    metrics_public: bool = Field(False, description="`1` leaves `/metrics` open when JWT_SECRET is set.")
    cors_origins: Annotated[list[str], NoDecode] = Field(
        [], description="Comma-separated origins, such as https://app.example.org, whose pages may call the API."
    )

    rate_limit: Rate = Field(
        (600, 60.0), description="Requests a client may make to the API, over all web servers: n/period; 0 is without limit."
    )
    trusted_proxies: Annotated[list[IPv4Network | IPv6Network], NoDecode] = Field(
        [], description="Comma-separated addresses and networks of proxies, whose X-Forwarded-For is believed."
    )

    web_processes: Count = Field(2, description="Web server processes.")
    web_threads: Count = Field(8, description="Threads in each of them.")
    worker_processes: Count = Field(2, description="Worker processes that `jobsys worker` keeps running.")
    worker_threads: Count = Field(
        8, description="Jobs each of them runs at a time; one while they only compute in Python, which wants a process per core instead."
    )

    max_body: Size = Field(
        1024 * 1024,
        ge=1024,
        le=64 * 1024 * 1024,
        description="Bytes of the largest body taken, and of each job in `/jobs/bulk`: `1MiB`, `512KiB`.",
    )

    max_retries: int = Field(3, ge=0, le=1000, description="Retries after the first attempt, for types that don't say.")
    retry_min_backoff: Duration = Field(1.0, description="Wait before the first retry; doubles with each, with jitter.")
    retry_max_backoff: Duration = Field(300.0, description="Longest wait between two attempts.")
    max_crashes: Count = Field(3, description="A job running when its worker died this often is dead-lettered.")

    ingest_rate: Rate = Field((1, 5.0), description="Pace of ingestion batches over all workers: n/period, evenly spaced; 0 is unlimited.")
    ingest_batch_size: Count = Field(3, description="Ids per ingestion batch.")
    ingest_allow_private: bool = Field(
        False, description="`1` permits INGEST_URL, and what it redirects to, to lead to addresses that are not public."
    )
    ingest_url: str | None = Field(None, description="URL template with `{id}` that ingestion fetches. Unset: nothing is fetched.")

    retention_days: int = Field(30, ge=0, description="Finished jobs are removed after this many days; 0 keeps all.")
    worker_heartbeat: Duration = Field(5.0, gt=0, description="How often a worker process says that it lives.")
    worker_lost_after: Duration = Field(30.0, gt=0, description="Silence after which its jobs go back to the queue.")
    poll_interval: Duration = Field(1.0, gt=0, description="How often workers look for jobs when no notification comes.")
    shutdown_grace: Duration = Field(30.0, description="Time running jobs get to finish after SIGTERM.")

    job_modules: Annotated[list[str], NoDecode] = Field([], description="Comma-separated modules with your own job types.")
    worker_queues: Annotated[list[str], NoDecode] = Field(
        [], description="Comma-separated queues that workers serve. Unset: all there are."
    )
    log_level: str = Field("INFO", description="DEBUG, INFO, WARNING or ERROR.")
    log_attempts: int = Field(
        100, ge=0, description="Successful attempts that a worker process logs one by one per second; of more it logs how many."
    )
    log_file: Path | None = Field(None, description="Also write the log, as JSON lines, to this file.")

    otel_exporter_otlp_endpoint: str | None = Field(
        None, description="Collector that takes OpenTelemetry traces by OTLP/HTTP, such as `http://127.0.0.1:4318`. Unset: no traces."
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SettingsError("; ".join(_complaint(each) for each in error.errors())) from None

    @field_validator("job_modules", "worker_queues", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value

    @field_validator("trusted_proxies", mode="before")
    @classmethod
    def _read_networks(cls, value: Any) -> Any:
        return [_network(text.strip()) for text in value.split(",") if text.strip()] if isinstance(value, str) else value

    @field_validator("smtp_tls", "log_level")
    @classmethod
    def _known_word(cls, value: str | None, info: Any) -> str | None:
        if value is None:
            return None
        words = {"smtp_tls": ("none", "starttls", "tls"), "log_level": ("DEBUG", "INFO", "WARNING", "ERROR")}[info.field_name]
        for word in words:
            if value.lower() == word.lower():
                return word
        raise ValueError(f'"{value}" is not one of {", ".join(words)}')

    @field_validator("smtp_tls")
    @classmethod
    def _tells_nobody_the_password(cls, value: str | None, info: Any) -> str | None:
        host = info.data.get("smtp_host")
        if value == "none" and info.data.get("smtp_user") and host and not is_loopback(host):
            raise ValueError(f"`none` would send SMTP_PASSWORD to {host} in the clear; use starttls or tls")
        return value

    @field_validator("mail_from")
    @classmethod
    def _is_one_sender(cls, value: str) -> str:
        if not re.fullmatch(r"[^@<>\s,]+@[^@<>\s,]+|[^@<>,\r\n]*<[^@<>\s,]+@[^@<>\s,]+>", value):
            raise ValueError("must be one address, such as jobs@example.org or Jobs <jobs@example.org>")
        return value

    @field_validator("otel_exporter_otlp_endpoint")
    @classmethod
    def _is_http(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError("must start with http:// or https://")
        return value

    @field_validator("ingest_url")
    @classmethod
    def _may_be_fetched(cls, value: str | None, info: Any) -> str | None:
        if value is None:
            return None
        if "{id}" not in value or not value.startswith(("http://", "https://")):
            raise ValueError("must start with http:// or https:// and contain {id}")
        if "@" in value.split("/")[2]:
            raise ValueError("must not contain a user or password")
        if not info.data.get("ingest_allow_private") and names_private_address(value):
            raise ValueError("names an address that is not public: set INGEST_ALLOW_PRIVATE=1 if that is meant")
        return value

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, values: list[str]) -> list[str]:
        for value in values:
            if value == "*":
                raise ValueError("* would let every site in: name each origin")
            if not re.fullmatch(r"https?://([a-z0-9_.-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?", value) or value.endswith(
                _DEFAULT_PORTS[value[:5]]
            ):
                raise ValueError(
                    f'"{value}" is not what a browser calls an origin, such as https://app.example.org or http://localhost:8080'
                )
        return values

    @property
    def viewer_credentials(self) -> tuple[str, str] | None:
        """(user, password) of one who may only look, or None when there is nobody."""
        return (self.viewer_user, self.viewer_pass) if self.viewer_user and self.viewer_pass else None

    @property
    def mail_tls(self) -> str:
        """How mail is sent: `none`, `starttls` or `tls`."""
        return self.smtp_tls or ("none" if is_loopback(self.smtp_host or "127.0.0.1") else "starttls")

    @property
    def admin_credentials(self) -> tuple[str, str] | None:
        """(user, password) for `/admin/*`, or None when it is open."""
        password = self.admin_pass or self.admin_password
        user = self.admin_user or ("admin" if self.admin_password else None)
        return (user, password) if user and password else None


def _network(text: str) -> IPv4Network | IPv6Network:
    try:
        return ip_network(text)
    except ValueError as error:
        why = f" ({error})" if "host bits" in str(error) else ""
        raise ValueError(f'"{text}" is neither an address nor a network such as 10.0.0.0/8 or fd00::/8{why}') from None


def _complaint(error: Any) -> str:
    name = str(error["loc"][0]).upper() if error["loc"] else "settings"
    return f"{name}: {str(error['msg']).removeprefix('Value error, ')}"
