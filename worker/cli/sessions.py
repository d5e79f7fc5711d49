"""`interviews verify` and `interviews session`: rows and their ledger."""

import sys
from collections import Counter
from datetime import datetime, timedelta
from typing import Any

import click

from worker.cli.screen import print_json, print_table, printable, progress_bar
from worker.cli.servers import open_database
from worker.errors import RefusedCall, WorkerError
from worker.sessions import Finding, Sessions, changes
from worker.settings import load_settings

NEEDS_A_PERSON = 3
FAULTS = {"behind"}  # the other kinds have honest causes
SHOWN = 20  # findings printed for a person
WIDEST = 50  # characters of a value, feedback for one; --json has all
AT_ITS_TIME = {"created_at", "completed_at"}  # the event's own, which stands before it
NAMES = {"user_id", "email", "resume_filename", "job_description_filename"}  # long, and they stand above the story
REMEDIES = {
    "behind": "restore each with: interviews session rebuild SESSION_ID",
    "ahead": "a person called an RPC or edited the row; no fault by itself",
    "waiting": "the next event of the session applies them, or the schedule does (celery -A worker beat)",
    "unfounded": "a person created the session, or its ledger was purged",
}


@click.command(epilog="Example: interviews verify   or: interviews verify --strict --json")
@click.option("--strict", is_flag=True, help="Rows that say more than their ledger are faults, too.")
@click.option("--json", "as_json", is_flag=True, help="For a program.")
def verify(strict: bool, as_json: bool) -> None:
    """Compare every session's row with its ledger.

    Exit status 3 when a row lacks what its ledger says.
    """
    sessions = Sessions(open_database(load_settings()))
    findings: list[Finding] = []
    checked = 0
    with progress_bar() as progress:
        task = progress.add_task("verifying", total=sessions.count())
        for count, found in sessions.verify():
            checked += count
            findings += found
            progress.update(task, completed=checked)
    if as_json:
        print_json({"checked": checked, "found": findings})
    else:
        _tell(checked, findings)
    faults = FAULTS | ({"ahead"} if strict else set())
    sys.exit(NEEDS_A_PERSON if any(finding["kind"] in faults for finding in findings) else 0)


@click.group()
def session() -> None:
    """One session: its story, its repair."""


@session.command(epilog="Example: interviews session show session_api_123456")
@click.argument("session_id")
@click.option("--json", "as_json", is_flag=True, help="For a program.")
def show(session_id: str, as_json: bool) -> None:
    """Show a session's row and its story: each event as it happened, how late it came, and what it changed."""
    sessions = Sessions(open_database(load_settings()))
    row, events = sessions.get(session_id), sessions.timeline(session_id)
    if row is None and not events:
        raise WorkerError(f"no session {session_id}, and no event of it")
    story = list(zip(events, changes(events), strict=True))
    if as_json:
        print_json({"session": row, "events": [event | {"changed": changed} for event, changed in story]})
        return
    if row is None:
        click.echo(printable(f"{session_id} has not started"))
    for name, value in (row or {}).items():
        if value is not None:
            click.echo(f"{name:26} {_shortened(value) if name == 'feedback' else printable(str(value))}")
    click.echo()
    print_table(
        ("happened (UTC)", "arrived", "event", "outcome", "changed in the row"),
        (
            (_moment(event["occurred_at"]), _arrived(event), _kind(event), _outcome(event), _changed(event, changed))
            for event, changed in story
        ),
    )


@session.command(epilog="Example: interviews session rebuild session_api_123456")
@click.argument("session_id")
@click.option("--force", is_flag=True, help="Even where the row says more than its ledger, and would lose that.")
def rebuild(session_id: str, force: bool) -> None:
    """Restore a session's row to what its ledger says, no more and no less."""
    sessions = Sessions(open_database(load_settings()))
    before = sessions.get(session_id) or {}
    if not any(event["type"] == "interview.started" for event in sessions.timeline(session_id)):
        raise WorkerError(f"the ledger does not hold the start of {session_id}: nothing changed")
    try:
        after = sessions.rebuild(session_id, force=force)
    except RefusedCall as refused:
        raise WorkerError(f"{refused}: nothing changed; --force restores it and loses the rest") from refused
    changed = [name for name in after if after[name] != before.get(name)]
    for name in changed:
        click.echo(f"{name}: {_shortened(before.get(name))} -> {_shortened(after[name])}")
    click.echo("restored" if changed else "it was as its ledger says")


def _tell(checked: int, findings: list[Finding]) -> None:
    for finding in sorted(findings, key=lambda finding: finding["kind"] not in FAULTS)[:SHOWN]:
        click.echo(f"{finding['session_id']}: {finding['kind']} {', '.join(finding['columns'])}".rstrip())
    if len(findings) > SHOWN:
        click.echo(f"and {len(findings) - SHOWN} more; --json shows all")
    kinds = Counter(finding["kind"] for finding in findings)
    for kind, count in sorted(kinds.items()):
        click.echo(f"{count} {kind}: {REMEDIES[kind]}")
    click.echo(f"{checked} sessions compared with their ledger")


def _moment(time: str) -> str:
    """To the second, in UTC, as Supabase answers it."""
    return time[:19].replace("T", " ")


def _arrived(event: dict[str, Any]) -> str:
    """How long after it happened; an engine's clock may be ahead of ours."""
    late = datetime.fromisoformat(event["received_at"]) - datetime.fromisoformat(event["occurred_at"])
    return f"+{timedelta(seconds=round(late.total_seconds()))}" if late > timedelta() else "at once"


def _kind(event: dict[str, Any]) -> str:
    return str(event["type"]).removeprefix("interview.")


def _outcome(event: dict[str, Any]) -> str:
    return "applied" if event["applied_at"] else "waiting"


def _changed(event: dict[str, Any], changed: dict[str, tuple[Any, Any]]) -> str:
    """One line for each column that the event changed."""
    told = [
        f"{name} {_shortened(after) if before is None else f'{_shortened(before)} -> {_shortened(after)}'}"
        for name, (before, after) in changed.items()
        if name not in AT_ITS_TIME | NAMES
    ]
    if changed.keys() & NAMES:
        told.append("user, e-mail and file names as above")
    if reason := event["payload"].get("reason"):
        told.append(f"(reason: {_shortened(reason)})")
    if not event["applied_at"]:
        return "nothing before its session starts"
    return "\n".join(told) or "nothing new"


def _shortened(value: Any) -> str:
    """On one line, as a terminal may be sent it."""
    text = printable(str(value)).replace("\n", " ")
    return text if len(text) <= WIDEST else f"{text[:WIDEST]}…"
