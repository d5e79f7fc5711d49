"""`interviews status`: how the events fare, on one screen."""

import sys
import time
from typing import Any

import click

from worker.cli.screen import print_json, print_table
from worker.database import Database
from worker.dead_letters import DeadLetters
from worker.errors import Misconfigured, Unavailable
from worker.hold import HoldState, hold_key, read_hold
from worker.outcomes import Outcomes
from worker.settings import load_settings
from worker.stream import EventStream, connect

NEEDS_A_PERSON = 3


@click.command(epilog="Example: interviews status --json")
@click.option("--json", "as_json", is_flag=True, help="For a program.")
def status(as_json: bool) -> None:
    """Show the stream, the hold, what waits and what is dead.

    Exit status 3 when a person is needed: dead letters are open, or the hold has a remedy.
    """
    settings = load_settings()
    client = connect(settings)
    stream = EventStream(client, settings.stream).state()
    hold = read_hold(client, hold_key(settings.stream))
    database = Database(settings)
    report: dict[str, Any] = {
        "stream_length": stream.length,
        "stream_claimed": stream.pending,
        "oldest_seconds": round(stream.oldest_seconds, 1),
        "packs_queued": client.llen("interview"),
        "hold": _told(hold),
        "outcomes_last_minute": dict(Outcomes(client, settings.stream).last_minute()),
        "supabase": "ok",
        "waiting": None,
        "dead_letters_open": None,
        "dead_letters_replayed": None,
    }
    needs_a_person = hold is not None and hold.remedy is not None
    try:
        report["waiting"] = database.count_waiting()
        letters = DeadLetters(database)
        report["dead_letters_open"] = letters.count("open")
        report["dead_letters_replayed"] = letters.count("replayed")
        needs_a_person = needs_a_person or bool(report["dead_letters_open"])
    except Unavailable as ill:
        report["supabase"] = f"{ill}: {ill.remedy}" if isinstance(ill, Misconfigured) else str(ill)
        needs_a_person = needs_a_person or isinstance(ill, Misconfigured)

    if as_json:
        print_json(report)
    else:
        print_table(("", ""), _rows(report))
    sys.exit(NEEDS_A_PERSON if needs_a_person else 0)


def _told(hold: HoldState | None) -> dict[str, Any] | None:
    if hold is None:
        return None
    return {"reason": hold.reason, "seconds": round(time.time() - hold.since), "remedy": hold.remedy}


def _rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    hold = report["hold"]
    dead = report["dead_letters_open"]
    return [
        ("stream", f"{report['stream_length']} events, {report['stream_claimed']} of them claimed"),
        ("oldest", f"{report['oldest_seconds']} s" if report["stream_length"] else "-"),
        ("packs queued", str(report["packs_queued"])),
        ("last minute", ", ".join(f"{n} {what}" for what, n in report["outcomes_last_minute"].items()) or "no events"),
        ("hold", f"for {hold['seconds']} s: {hold['reason']}" if hold else "none"),
        *([("", f"mend it: {hold['remedy']}")] if hold and hold["remedy"] else []),
        ("supabase", report["supabase"]),
        ("waiting", f"{_shown(report['waiting'])} events whose session has not started"),
        ("dead letters", f"{_shown(dead)} open, {_shown(report['dead_letters_replayed'])} replayed"),
        *([("", "see them: interviews dlq list")] if dead else []),
    ]


def _shown(count: int | None) -> str:
    return "?" if count is None else str(count)
