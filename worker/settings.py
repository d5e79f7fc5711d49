"""Settings from the environment, checked once at the start.

A wrong or missing one is one readable line and exit status 2 (`SettingsError`), never a traceback.
"""

from pathlib import Path
from typing import Annotated, Final, Literal, Self, TypeVar, overload

import httpx
import redis
from pydantic import AfterValidator, AliasChoices, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from worker.errors import SettingsError

STREAM: Final = "interview:events"
QUEUE: Final = "interview"

Duration = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Duration


def _redis_url(value: SecretStr) -> SecretStr:
    if not value.get_secret_value().startswith(("redis://", "rediss://", "unix://")):
        raise ValueError("must begin with redis://, rediss:// or unix://")
    problem = None  # raised outside of except: the cause may quote the password
    try:
        redis.ConnectionPool.from_url(value.get_secret_value()).make_connection()  # which does not connect
    except ValueError:
        problem = "is no URL: write /, : and @ in its password as %2F, %3A and %40"
    except TypeError:
        problem = "has an option behind its ? that redis-py does not know"
    if problem:
        raise ValueError(problem)
    return value


def _http_url(value: str) -> str:
    if not value.startswith(("http://", "https://")):
        raise ValueError("must begin with https:// or http://")
    try:
        url = httpx.URL(value)
    except httpx.InvalidURL as error:
        raise ValueError(f"is no URL: {error}") from None
    if not url.host:
        raise ValueError("names no host")
    return value


def _key(value: SecretStr) -> SecretStr:
    key = value.get_secret_value()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ValueError("holds characters that no key has")
    return value


HttpUrl = Annotated[str, AfterValidator(_http_url)]


class StreamSettings(BaseSettings):
    """What publishing needs: `INTERVIEW_` before a name unless an alias is given."""

    model_config = SettingsConfigDict(env_prefix="INTERVIEW_", frozen=True, extra="ignore", env_ignore_empty=True)

    redis_url: Annotated[SecretStr, AfterValidator(_redis_url)] = Field(validation_alias="REDIS_URL")
    stream: str = Field(default=STREAM, min_length=1)  # key of the Redis stream

    @property
    def queue(self) -> str:
        """Celery's queue. Another stream has another one, or its packs would end up with the workers of the first."""
        return QUEUE if self.stream == STREAM else f"{QUEUE}:{self.stream}"


class Settings(StreamSettings):
    """What a worker needs: every setting, its unit and its default."""

    supabase_url: HttpUrl = Field(validation_alias="SUPABASE_URL")
    supabase_secret_key: Annotated[SecretStr, AfterValidator(_key)] = Field(
        validation_alias=AliasChoices("SUPABASE_SECRET_KEY", "SUPABASE_SERVICE_ROLE_KEY")
    )
    supabase_rest_url: HttpUrl | None = Field(default=None, validation_alias="SUPABASE_REST_URL")

    pack_size: int = Field(default=1000, ge=1, le=1000)  # events at most in one RPC
    pool: Literal["prefork", "threads"] = "prefork"  # Celery's pool
    concurrency: int = Field(default=3, ge=1, le=64)  # packs applied at once by one worker

    rpc_timeout_seconds: Seconds = 10.0  # longest wait for one answer of Supabase
    backoff_seconds: Seconds = 5.0  # longest wait between two probes of an ill Supabase (full jitter)
    reclaim_seconds: Seconds = 60.0  # idle time after which another worker claims an entry
    hold_seconds: Seconds = 3600.0  # longest time a task keeps its pack in an outage before it gives it back
    grace_seconds: Seconds = 25.0  # from SIGTERM to the end at most; packs cut then come again
    heartbeat_file: Path | None = None  # touched every few seconds while all is well, for a liveness probe
    metrics_port: int | None = Field(default=None, ge=1, le=65535)  # where Prometheus asks; not set: nothing is counted

    dead_share_limit: float = Field(default=0.5, gt=0, le=1)  # of a minute's events; over it all hold (1: never)
    dead_share_from: int = Field(default=100, ge=1)  # dead letters in a minute from which their share counts

    waiting_hours: Duration = 24.0  # an event without its session's start is dead after that
    keep_ledger_days: Duration | None = None  # ledger of ended sessions; not set: for ever

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    @model_validator(mode="after")
    def _times_fit(self) -> Self:
        if self.reclaim_seconds <= self.rpc_timeout_seconds:
            raise ValueError("INTERVIEW_RECLAIM_SECONDS must exceed INTERVIEW_RPC_TIMEOUT_SECONDS, or work doubles")
        if self.grace_seconds <= self.rpc_timeout_seconds:
            raise ValueError("INTERVIEW_GRACE_SECONDS must exceed INTERVIEW_RPC_TIMEOUT_SECONDS, or no stop is clean")
        return self


S = TypeVar("S", bound=StreamSettings)


@overload
def load_settings() -> Settings: ...
@overload
def load_settings(kind: type[S]) -> S: ...
def load_settings(kind: type[StreamSettings] = Settings) -> StreamSettings:
    """Read the environment; raise SettingsError, one line that names what to set."""
    try:
        return kind()
    except ValidationError as error:
        raise SettingsError(_explained(error)) from None


def _explained(error: ValidationError) -> str:
    problems = error.errors(include_input=False, include_url=False, include_context=False)
    missing = [_variable(p["loc"]) for p in problems if p["type"] == "missing"]
    wrong = [
        f"{_variable(p['loc'])} {p['msg'].removeprefix('Value error, ')}".strip()
        for p in problems
        if p["type"] != "missing"
    ]
    if missing:
        wrong.append(f"set {', '.join(missing)} ('interviews up' prints them for a local stack)")
    return "; ".join(wrong)


def _variable(location: tuple[int | str, ...]) -> str:
    if not location:
        return ""
    name = str(location[0])
    return f"INTERVIEW_{name.upper()}" if name in Settings.model_fields else name
