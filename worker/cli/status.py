"""`interviews status`: how the events fare, on one screen."""

import sys
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from typing import Any

import click
import redis
from rich.live import Live

from worker.cli.screen import make_table, print_json, print_table, screen
from worker.cli.servers import open_database, open_redis
from worker.database import Database
from worker.dlq import DeadLetters
from worker.doctor.broker import FULL, MEBIBYTE
from worker.errors import Misconfigured, Unavailable
from worker.hold import hold_key, read_hold
from worker.outcomes import Outcomes
from worker.settings import Settings, load_settings
from worker.slots import worker_of
from worker.stream import EventStream, StreamState
from worker.worker_state import WorkerStates

NEEDS_A_PERSON = 3

Report = dict[str, Any]


@click.command(epilog="Example: interviews status --watch   or: interviews status --json")
@click.option("--json", "as_json", is_flag=True, help="For a program.")
@click.option("--watch", is_flag=True, help="Look again and again, until Ctrl-C.")
@click.option(
    "--interval", type=click.FloatRange(min=0.1), default=2.0, show_default=True, help="Seconds between two looks."
)
def status(as_json: bool, watch: bool, interval: float) -> None:
    """Show the stream, the workers, the hold, what waits and what is dead.

    Exit status 3 when a person is needed: dead letters are open, the hold has a remedy, a worker stands still, or
    events wait and no worker runs.
    """
    if watch and as_json:
        raise click.UsageError("--watch is for a person, --json for a program: call it again and again")
    settings = load_settings()
    client, database = open_redis(settings), open_database(settings)
    if watch:
        sys.exit(_watched(settings, client, database, interval))
    report = _of_redis(settings, client) | _of_supabase(database)
    problems = _problems(report, settings)
    if as_json:
        print_json(report | {"problems": problems})
    else:
        print_table(("", ""), _rows(report, problems))
    sys.exit(NEEDS_A_PERSON if problems else 0)


def _watched(settings: Settings, client: redis.Redis, database: Database, interval: float) -> int:
    """Show it live until Ctrl-C, one table after the other where no terminal is; answer the last look's exit status."""
    found, console = 0, screen()
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        show = partial(live.update, refresh=True) if console.is_terminal else console.print
        while True:
            try:
                report = _of_redis(settings, client) | _of_supabase(database)
                problems = _problems(report, settings)
                rows = _rows(report, problems)
            except redis.RedisError as error:
                problems = [f"bring Redis back ({type(error).__name__})"]
                rows = [("redis", "does not answer"), ("to do", problems[0])]
            found = NEEDS_A_PERSON if problems else 0
            now = time.strftime("%H:%M:%S")
            show(make_table(("", ""), [*rows, ("", f"{now}, again in {interval:g} s; Ctrl-C ends")]))
            time.sleep(interval)
    return found


def _of_redis(settings: Settings, client: redis.Redis) -> Report:
    stream = EventStream(client, settings.stream).state()
    hold = read_hold(client, hold_key(settings.stream))
    return {
        "redis": "ok",  # it answered
        "redis_memory": _memory(client),
        "stream_length": stream.length,
        "stream_claimed": stream.pending,
        "oldest_seconds": round(stream.oldest_seconds, 1),
        "messages_queued": client.llen(settings.queue),
        "outcomes_last_minute": dict(Outcomes(client, settings.stream).last_minute()),
        "hold": hold and {"reason": hold.reason, "seconds": round(time.time() - hold.since), "remedy": hold.remedy},
        "workers": _workers(client, settings.stream, stream),
    }


def _memory(client: redis.Redis) -> Report | None:
    """Bytes used, and at most (0 for no limit); None where our user may not know."""
    try:
        told: Any = client.info("memory")
    except redis.exceptions.NoPermissionError:
        return None
    return {"used": told["used_memory"], "limit": told["maxmemory"]}


def _workers(client: redis.Redis, key: str, stream: StreamState) -> list[Report]:
    """Those that run, and those that are silent and still have a claim on events."""
    alive = WorkerStates(client, key).alive()
    claimed: Counter[str] = Counter()
    for consumer, entries in stream.claimed.items():
        claimed[worker_of(consumer)] += entries
    running = [
        {
            "id": worker,
            "worker": state.hostname,
            "state": state.state,
            "claimed": claimed[worker],
            "packs": state.packs,
            "seconds": round(time.time() - state.started_at),
        }
        for worker, state in alive.items()
    ]
    silent = [
        {"id": worker, "worker": worker.rpartition("-")[0], "state": "silent", "claimed": entries}
        for worker, entries in claimed.items()
        if entries and worker not in alive
    ]
    return running + silent


def _of_supabase(database: Database) -> Report:
    report: Report = dict.fromkeys(("waiting", "dead_letters_open", "dead_letters_replayed", "dead_letters_by_reason"))
    report |= {"supabase": "ok", "supabase_remedy": None}
    try:
        report["waiting"] = database.count_waiting()
        letters = DeadLetters(database).counts()
        report["dead_letters_open"] = sum(letters["open"].values())
        report["dead_letters_replayed"] = sum(letters["replayed"].values())
        report["dead_letters_by_reason"] = letters["open"]
    except Unavailable as ill:
        report["supabase"] = str(ill)
        report["supabase_remedy"] = ill.remedy if isinstance(ill, Misconfigured) else None
    return report


def _problems(report: Report, settings: Settings) -> list[str]:
    """What needs a person, each with what to do next."""
    hold, workers, memory = report["hold"], report["workers"], report["redis_memory"]
    found = [
        f"{each['worker']} is {each['state']}: restart it, its events are taken over"
        for each in workers
        if each["state"].startswith("stalled")
    ]
    if report["oldest_seconds"] > settings.reclaim_seconds and all(each["state"] == "silent" for each in workers):
        found.append("events wait and no worker runs: celery -A worker worker")
    if memory and memory["limit"] and memory["used"] > FULL * memory["limit"]:
        found.append("Redis is nearly full, and then refuses events: add workers, or raise its maxmemory")
    if report["supabase_remedy"]:
        found.append(f"Supabase: {report['supabase_remedy']}")
    elif hold and hold["remedy"]:
        found.append(f"the hold: {hold['remedy']}")
    if report["dead_letters_open"]:
        found.append("dead letters are open: interviews dlq list")
    return found


def _rows(report: Report, problems: list[str]) -> list[tuple[str, str]]:
    hold = report["hold"]
    workers = [
        f"{each['worker']}: {each['state']}, {each['claimed']} events claimed"
        + (f", {each['packs']} packs in {each['seconds']} s" if "packs" in each else ", taken over soon")
        for each in report["workers"]
    ]
    return [
        ("stream", f"{report['stream_length']} events, {report['stream_claimed']} of them claimed"),
        ("oldest", f"{report['oldest_seconds']} s" if report["stream_length"] else "-"),
        ("celery queue", f"{report['messages_queued']} messages"),
        ("last minute", _last_minute(report["outcomes_last_minute"])),
        *zip(["workers", *[""] * len(workers)], workers or ["none"], strict=False),
        ("hold", f"for {hold['seconds']} s: {hold['reason']}" if hold else "none"),
        ("redis", report["redis"] + _told_memory(report["redis_memory"])),
        ("supabase", report["supabase"]),
        ("waiting", f"{_shown(report['waiting'])} events whose session has not started"),
        (
            "dead letters",
            f"{_shown(report['dead_letters_open'])} open, {_shown(report['dead_letters_replayed'])} replayed"
            + "".join(f"\n{count} {reason}" for reason, count in (report["dead_letters_by_reason"] or {}).items()),
        ),
        *zip(["to do", *[""] * len(problems)], problems or ["nothing"], strict=False),
    ]


def _told_memory(memory: Report | None) -> str:
    if memory is None:
        return ""
    limit = f" of {memory['limit'] / MEBIBYTE:.0f}" if memory["limit"] else ""
    return f", {memory['used'] / MEBIBYTE:.1f}{limit} MiB used"


def _last_minute(outcomes: dict[str, int]) -> str:
    if not outcomes:
        return "no events"
    counts = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
    return f"{sum(outcomes.values()) / 60:.1f} events/s: {counts}"


def _shown(count: int | None) -> str:
    return "?" if count is None else str(count)
