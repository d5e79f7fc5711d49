"""`interviews dlq`: find, read, replay and discard dead letters."""

import sys
import time
from typing import Any, get_args

import click

from worker.cli.screen import print_json, print_table, printable
from worker.database import Database
from worker.dead_letters import REASONS, DeadLetters, Status
from worker.errors import WorkerError
from worker.settings import Settings, load_settings
from worker.stream import EventStream, connect

POLL_SECONDS = 0.25

letter_id = click.IntRange(1, 2**63 - 1)
ids_argument = click.argument("ids", metavar="[ID]...", nargs=-1, type=letter_id)
all_option = click.option("--all", "everything", is_flag=True, help="All open letters.")
reasons = click.Choice(REASONS)
reason_option = click.option("--reason", type=reasons, metavar="REASON", help="All open letters of one reason.")
json_option = click.option("--json", "as_json", is_flag=True, help="For a program.")


@click.group()
def dlq() -> None:
    """Dead letters: events that could not be applied, each with its reason. None expires by itself."""


@dlq.command("list", epilog="Example: interviews dlq list --reason unknown_user")
@click.option("--status", type=click.Choice([*get_args(Status), "all"]), default="open", show_default=True)
@click.option("--reason", type=reasons, metavar="REASON", help="Only this reason, as unknown_user.")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True)
@json_option
def list_letters(status: str, reason: str | None, limit: int, as_json: bool) -> None:
    """List dead letters, the latest failure first."""
    letters = _dead_letters(load_settings())
    chosen: Any = None if status == "all" else status
    found = letters.find(status=chosen, reason=reason, limit=limit)
    if as_json:
        print_json(found)
        return
    if not found:
        click.echo("no dead letters" if status == "all" else f"no {status} dead letters")
        return
    columns = ("id", "status", "reason", "type", "session_id", "attempts", "detail")
    print_table(columns, ([letter[column] for column in columns] for letter in found))
    if len(found) == limit:
        click.echo(f"the latest {limit}; --limit shows more", err=True)


@dlq.command(epilog="Example: interviews dlq show 7")
@click.argument("id", type=letter_id)
@json_option
def show(id: int, as_json: bool) -> None:  # noqa: A002 - the argument's name on the command line
    """Show one dead letter with its event, as it was received."""
    (letter,) = _existing(_dead_letters(load_settings()), (id,))
    if as_json:
        print_json(letter)
        return
    for name, value in letter.items():
        if name != "event" and value is not None:
            click.echo(f"{name:16} {printable(str(value))}")
    click.echo(f"\n{printable(letter['event'])}")


@dlq.command(epilog="Example: interviews dlq replay 7   or: interviews dlq replay --reason unknown_user")
@ids_argument
@all_option
@reason_option
@click.option("--wait", type=click.FloatRange(0), default=10.0, show_default=True, help="Seconds to wait for the end.")
def replay(ids: tuple[int, ...], everything: bool, reason: str | None, wait: float) -> None:
    """Publish dead letters again, and tell what became of them.

    Mend the cause first: create the user, deploy the worker, apply the SQL. Exit status 1 when some failed again.
    """
    settings = load_settings()
    letters = _dead_letters(settings)
    chosen = _chosen(letters, ids, everything, reason)
    replayed = letters.replay(chosen, EventStream(connect(settings), settings.stream))
    _tell_unmoved(chosen, replayed)
    ended = _wait_for_end(letters, [letter["id"] for letter in replayed], wait)
    failed = [letter for letter in ended if letter["status"] == "open"]
    for letter in failed:
        click.echo(f"{letter['id']}: failed again, {letter['reason']}: {letter['detail']}", err=True)
    applied = sum(letter["status"] == "resolved" for letter in ended)
    under_way = len(ended) - applied - len(failed)
    click.echo(f"{len(replayed)} replayed: {applied} applied, {len(failed)} failed again, {under_way} under way")
    sys.exit(1 if failed else 0)


@dlq.command(epilog="Example: interviews dlq discard 7 --note 'test session of the engine'")
@ids_argument
@all_option
@reason_option
@click.option("--note", required=True, help="Why; it is kept with the letter.")
def discard(ids: tuple[int, ...], everything: bool, reason: str | None, note: str) -> None:
    """Close dead letters without applying them. The letters are kept."""
    if not note.strip():
        raise click.BadParameter("say why", param_hint="--note")
    letters = _dead_letters(load_settings())
    chosen = _chosen(letters, ids, everything, reason)
    discarded = letters.discard(chosen, note)
    _tell_unmoved(chosen, discarded)
    click.echo(f"{len(discarded)} discarded")


def _dead_letters(settings: Settings) -> DeadLetters:
    return DeadLetters(Database(settings))


def _existing(letters: DeadLetters, ids: tuple[int, ...]) -> list[dict[str, Any]]:
    found = letters.get(list(ids))
    missing = sorted(set(ids) - {letter["id"] for letter in found})
    if missing:
        raise WorkerError(f"no dead letter {', '.join(map(str, missing))}: see 'interviews dlq list --status all'")
    return found


def _chosen(letters: DeadLetters, ids: tuple[int, ...], everything: bool, reason: str | None) -> list[int]:
    """The ids that the options name; exactly one way of naming them is allowed."""
    if bool(ids) + everything + (reason is not None) != 1:
        raise click.UsageError("name dead letters by ID, by --reason, or all of them by --all")
    if ids:
        return [letter["id"] for letter in _existing(letters, ids)]
    return letters.open_ids(reason=reason)


def _tell_unmoved(chosen: list[int], moved: list[dict[str, Any]]) -> None:
    for letter_id in sorted(set(chosen) - {letter["id"] for letter in moved}):
        click.echo(f"{letter_id}: not open, left as it is", err=True)


def _wait_for_end(letters: DeadLetters, ids: list[int], seconds: float) -> list[dict[str, Any]]:
    """The letters once none of them is under way, or as they are when the time is up."""
    deadline = time.monotonic() + seconds
    while True:
        found = letters.get(ids)
        if time.monotonic() >= deadline or all(letter["status"] != "replayed" for letter in found):
            return found
        time.sleep(POLL_SECONDS)
