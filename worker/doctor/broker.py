"""Redis, the server: is it there, is it one that keeps events, and will it go on taking them?"""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from shlex import quote
from typing import Any, Final

import redis

from worker.doctor.clocks import check_clock
from worker.doctor.environment import EXPORTS
from worker.doctor.finding import Finding
from worker.doctor.redis_cli import redis_cli
from worker.settings import StreamSettings

OLDEST: Final = (6, 2)
FULL: Final = 0.9  # share of maxmemory from which events may soon be refused
MEBIBYTE: Final = 1024 * 1024


@dataclass(frozen=True)
class Facts:
    """What Redis tells of itself; empty, or without a name, where it does not. `cli` begins a remedy's command."""

    hello: dict[str, str] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)  # sections "server", "memory", "persistence", "replication"
    config: dict[str, str] = field(default_factory=dict)  # the two settings that matter
    cli: str = "redis-cli"


def check_broker(
    settings: StreamSettings, client: redis.Redis, clock: Callable[[], float]
) -> Generator[Finding, None, bool]:
    """Check the server; answers whether there is one to go on with."""
    try:
        client.ping()
    except redis.RedisError as error:
        yield _unreachable(settings, client, error)
        return False
    yield Finding("Redis", "ok", f"{_place(client)} answers")
    facts = _facts(settings, client)
    yield version(facts)
    kind = mode(facts)
    yield kind
    if kind.state == "failed":
        return False
    yield role(facts)
    yield persistence(facts)
    yield eviction(facts)
    yield memory(facts)
    before = clock()
    seconds, microseconds = _any(client).time()
    yield check_clock("Redis clock", "Redis", seconds + microseconds / 1e6, (before + clock()) / 2)
    return True


def version(facts: Facts) -> Finding:
    """XPENDING with IDLE came with 6.2."""
    told = facts.hello.get("version") or facts.info.get("redis_version")
    if not told:
        return Finding("Redis version", "unknown", "it does not tell", f"# 6.2 or newer?\n{facts.cli} INFO server")
    if tuple(int(part) for part in str(told).split(".")[:2] if part.isdigit()) < OLDEST:
        remedy = f"# upgrade it to 6.2 or newer, or use one that is:\n{EXPORTS['REDIS_URL']}"
        return Finding("Redis version", "failed", f"{told} lacks commands that workers need", remedy)
    return Finding("Redis version", "ok", str(told))


def mode(facts: Facts) -> Finding:
    """Celery's transport and our transactions need all keys in one place."""
    told = facts.hello.get("mode") or facts.info.get("redis_mode")
    if told == "standalone":
        return Finding("Redis mode", "ok", "standalone")
    if not told:
        return Finding(
            "Redis mode", "unknown", "it does not tell", f"# redis_mode must be standalone:\n{facts.cli} INFO server"
        )
    remedy = f"# use one without cluster mode, itself and not its Sentinel:\n{EXPORTS['REDIS_URL']}"
    return Finding("Redis mode", "failed", f"{told}: Celery cannot work with it", remedy)


def role(facts: Facts) -> Finding:
    """A replica takes no writes."""
    told = facts.hello.get("role") or facts.info.get("role")
    if told == "master":
        return Finding("Redis role", "ok", "primary")
    if not told:
        return Finding("Redis role", "unknown", "it does not tell", f"# master?\n{facts.cli} ROLE")
    remedy = f"# use its primary instead; or, where this one shall be the primary:\n{facts.cli} REPLICAOF NO ONE"
    return Finding("Redis role", "failed", "it is a replica and takes no events", remedy)


def persistence(facts: Facts) -> Finding:
    """Events that are not yet in Postgres are nowhere else."""
    check, loses = "Redis persistence", "what is not yet in Postgres does not survive a restart of Redis"
    if facts.config.get("appendonly") == "yes" or facts.info.get("aof_enabled") == 1:
        return Finding(check, "ok", "it keeps an append-only file")
    if "appendonly" in facts.config:
        return Finding(check, "failed", f"appendonly is no: {loses}", _config_set(facts, "appendonly", "yes"))
    told = "it tells of no append-only file" if "aof_enabled" in facts.info else "it does not tell"
    look = (
        "# a managed Redis may keep events in its own way: see its settings for persistence\n"
        f"# any other, as a user who may look (aof_enabled must be 1):\n{facts.cli} INFO persistence"
    )
    return Finding(check, "unknown", f"{told}, and CONFIG is refused", look)


def eviction(facts: Facts) -> Finding:
    """A full Redis must refuse events, which the publisher is told, and never drop what it has."""
    check = "Redis eviction"
    policy = facts.config.get("maxmemory-policy") or facts.info.get("maxmemory_policy")
    if policy == "noeviction":
        return Finding(check, "ok", "noeviction")
    if policy is None:
        look = f"# as a user who may look (maxmemory_policy must be noeviction):\n{facts.cli} INFO memory"
        return Finding(check, "unknown", "it does not tell, and CONFIG is refused", look)
    remedy = _config_set(facts, "maxmemory-policy", "noeviction")
    return Finding(check, "failed", f"maxmemory-policy is {policy}: a full Redis drops events", remedy)


def memory(facts: Facts) -> Finding:
    """Where it is full, publishers get errors."""
    check, used, limit = "Redis memory", facts.info.get("used_memory"), facts.info.get("maxmemory")
    if used is None or limit is None:
        look = f"# as a user who may look (used_memory well below maxmemory):\n{facts.cli} INFO memory"
        return Finding(check, "unknown", "it does not tell", look)
    if not limit:
        return Finding(check, "ok", f"{_mebibytes(used)} used, and no maxmemory")
    told = f"{used / limit:.0%} of maxmemory {_mebibytes(limit)} used"
    if used < FULL * limit:
        return Finding(check, "ok", told)
    wanted = f"{2 * -(-max(used, limit) // MEBIBYTE)}mb"
    return Finding(
        check,
        "failed",
        f"{told}: when it is full, it refuses events",
        "# what uses it: a long stream shrinks as workers apply it ('interviews status')\n"
        + _config_set(facts, "maxmemory", wanted),
    )


def _config_set(facts: Facts, name: str, value: str) -> str:
    if not facts.config:
        return f"# in the settings of your managed Redis, or as its administrator: {name} {value}"
    return (
        f"{facts.cli} CONFIG SET {name} {value}\n"
        f"# for its next start, too; where it has no file, give it --{name} {value}:\n"
        f"{facts.cli} CONFIG REWRITE"
    )


def _unreachable(settings: StreamSettings, client: redis.Redis, error: redis.RedisError) -> Finding:
    place = _place(client)
    if isinstance(error, redis.AuthenticationError):
        return Finding("Redis", "failed", f"{place} refuses the password or the user", EXPORTS["REDIS_URL"])
    if isinstance(error, redis.ResponseError):  # a database number that it does not have
        return Finding("Redis", "failed", f"{place} answers: {error}", EXPORTS["REDIS_URL"])
    where = client.connection_pool.connection_kwargs
    options = f"--unixsocket {quote(where['path'])}" if "path" in where else f"--port {where.get('port', 6379)}"
    if where.get("password"):
        options += " --requirepass PASSWORD"
    return Finding(
        "Redis",
        "failed",
        f"{place} does not answer ({type(error).__name__})",
        "# is REDIS_URL right (rediss:// where it speaks TLS)? If so, start it there:\n"
        f"redis-server {options} --appendonly yes --maxmemory-policy noeviction",
    )


def _place(client: redis.Redis) -> str:
    """Where it is, without user and password."""
    where = client.connection_pool.connection_kwargs
    return str(where.get("path") or f"{where.get('host', 'localhost')}:{where.get('port', 6379)}")


def _facts(settings: StreamSettings, client: redis.Redis) -> Facts:
    hello = _answer(client, "HELLO") or {}
    if isinstance(hello, list):  # in RESP2
        hello = dict(zip(hello[::2], hello[1::2], strict=True))
    config: dict[str, str] = {}
    for name in ("appendonly", "maxmemory-policy"):
        config |= {_text(key): _text(value) for key, value in (_answer(client, "CONFIG GET", name) or {}).items()}
    return Facts(
        hello={_text(name): _text(value) for name, value in hello.items()},
        info=_answer(client, "INFO") or {},
        config=config,
        cli=redis_cli(settings),
    )


def _answer(client: redis.Redis, *command: str) -> Any:
    """A command's answer, None where it is refused: by an ACL, or by who manages this Redis."""
    try:
        return _any(client).execute_command(*command)
    except redis.ResponseError:
        return None


def _any(client: redis.Redis) -> Any:
    return client  # redis-py types each answer as "maybe awaitable"


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _mebibytes(count: int) -> str:
    return f"{count / MEBIBYTE:.0f} MiB"
