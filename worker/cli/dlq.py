"""`interviews dlq`: find, group, read, replay, edit, discard, restore and export dead letters."""

import difflib
import getpass
import json
import math
import re
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, TypeVar, get_args

import click
import redis

from worker.cli.screen import print_json, print_table, printable, progress_bar, screen
from worker.cli.servers import open_database, open_redis
from worker.dead_letters import REASONS, original_bytes
from worker.dlq import LADDER, Action, Chosen, DeadLetters, Filter, Letter, Replay, Status
from worker.errors import WorkerError
from worker.sessions import Sessions
from worker.settings import Settings, load_settings
from worker.stream import EventStream

SAMPLE = 3  # letters shown before a question
SHOWN = 20  # letters named at the end, of each kind
WIDE = 160  # characters from which on each value has a column of its own
UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}

F = TypeVar("F", bound=Callable[..., Any])


class Time(click.ParamType):  # type: ignore[type-arg]  # generic to mypy only
    """A time as ISO 8601, UTC unless it says otherwise, or so long ago: 30m, 2h, 7d."""

    name = "time"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """ISO 8601 with an offset."""
        try:
            if ago := re.fullmatch(r"(\d{1,6})([smhd])", value):
                return (datetime.now(UTC) - timedelta(**{UNITS[ago[2]]: int(ago[1])})).isoformat(timespec="seconds")
            told = datetime.fromisoformat(value)
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is no time: 2026-11-24T12:00:00Z, or so long ago, as 30m, 2h, 7d", param, ctx)
        return (told if told.tzinfo else told.replace(tzinfo=UTC)).isoformat()


class Words(click.ParamType):  # type: ignore[type-arg]  # generic to mypy only
    """Some text; a shell variable that is not set is none, and must not widen a filter."""

    name = "text"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text as it is."""
        if not value.strip():
            self.fail("it is empty", param, ctx)
        return value


class Number(click.FloatRange):
    """A number of the range; not "nan" nor "inf", which Python takes for numbers."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is no number", param, ctx)
        return number


def _logged_in() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        return "unknown"


letter_id = click.IntRange(1, 2**63 - 1)
json_option = click.option("--json", "as_json", is_flag=True, help="For a program.")
by_option = click.option(
    "--by", "actor", type=Words(), metavar="NAME", default=_logged_in, show_default="who is logged in", help="Who acts."
)


def filtered(statuses: tuple[str, ...], default: str) -> Callable[[F], F]:
    """Options that say which letters are meant."""
    options = [
        click.option("--status", type=click.Choice(statuses), default=default, show_default=True),
        click.option("--reason", type=click.Choice(REASONS), metavar="REASON", help="As unknown_user."),
        click.option("--type", "type_", type=Words(), metavar="TYPE", help="As interview.started."),
        click.option("--session", "session_id", type=Words(), metavar="ID", help="Of one session."),
        click.option("--user", "user_id", type=click.UUID, metavar="UUID", help="Of one user."),
        click.option("--since", type=Time(), help="Failed last at this time or later; or 30m, 2h, 7d ago."),
        click.option("--until", type=Time(), help="Failed last before this time."),
        click.option("--text", type=Words(), metavar="TEXT", help="With this text in the detail."),
        click.option("--group", type=Words(), metavar="GROUP", help="Of one group of 'interviews dlq groups'."),
    ]

    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def chosen(statuses: tuple[str, ...], default: str) -> Callable[[F], F]:
    """The same for commands that act: letters by id or by filter, and all of them only if asked for."""

    def decorate(command: F) -> F:
        command = filtered(statuses, default)(command)
        command = click.option("--yes", is_flag=True, help="Do not ask before acting on --all.")(command)
        command = click.option("--all", "everything", is_flag=True, help="All letters of this status.")(command)
        return click.argument("ids", metavar="[ID]...", nargs=-1, type=letter_id)(command)

    return decorate


ALL_STATUSES = (*get_args(Status), "all")
OPEN_STATUSES = ("open", "replayed")


@click.group()
def dlq() -> None:
    """Dead letters: events that could not be applied, each with its reason. None expires by itself."""


@dlq.command("list", epilog="Example: interviews dlq list --reason unknown_user --since 2h")
@filtered(ALL_STATUSES, "open")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True)
@click.option("--before", type=letter_id, metavar="ID", help="The page after this id: the last of the page before.")
@json_option
def list_letters(limit: int, before: int | None, as_json: bool, **options: str | None) -> None:
    """List dead letters, the latest first."""
    wanted = _filter(options)
    found = _dead_letters(load_settings()).find(wanted, limit=limit, before=before)
    if as_json:
        print_json(found)
        return
    if not found:
        click.echo("no dead letters" if wanted.status is None else f"no {wanted.status} dead letters")
        return
    columns = ("id", "status", "reason", "type", "session_id", "attempts", "detail")
    narrow = (("id",), ("status",), ("reason", "detail"), ("type", "session_id"), ("attempts",))
    _print_rows(({column: letter[column] for column in columns} for letter in found), narrow)
    if len(found) == limit:
        click.echo(f"the latest {limit}; go on with --before {found[-1]['id']}", err=True)


@dlq.command(epilog="Example: interviews dlq groups   then: interviews dlq replay --group GROUP")
@filtered(ALL_STATUSES, "open")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True)
@json_option
def groups(limit: int, as_json: bool, **options: str | None) -> None:
    """Group dead letters by reason, type and detail; ids and numbers in a detail do not count."""
    found = _dead_letters(load_settings()).groups(_filter(options), limit=limit)
    if as_json:
        print_json(found)
        return
    if not found:
        click.echo("no dead letters")
        return
    rows = (
        {"group": each["group"], "letters": each["letters"], "reason": each["reason"], "type": each["type"],
         "first": _moment(each["first_failed_at"]), "last": _moment(each["last_failed_at"]),
         "sample": each["sample"], "detail": each["detail"]}
        for each in found
    )  # fmt: skip
    _print_rows(rows, (("group",), ("letters",), ("reason", "type", "detail"), ("first", "last"), ("sample",)))
    if len(found) == limit:
        click.echo(f"the {limit} largest; more with --limit", err=True)


@dlq.command(epilog="Example: interviews dlq show 7")
@click.argument("id", type=letter_id)
@json_option
def show(id: int, as_json: bool) -> None:  # noqa: A002 - the argument's name on the command line
    """Show one dead letter: its history, its event as it was received, and its session's story."""
    settings = load_settings()
    letter = _existing(_dead_letters(settings), id)
    session = letter["session_id"]
    timeline = Sessions(open_database(settings)).timeline(session) if session else []
    if as_json:
        print_json(letter | {"timeline": timeline})
        return
    for name, value in letter.items():
        if name != "event" and value is not None:
            click.echo(f"{name:16} {printable(str(value))}")
    click.echo(f"\n{printable(letter['event'])}")
    if timeline:
        click.echo(f"\nwhat is known of {printable(session)}:")
        columns = ("occurred_at", "type", "applied_at")
        print_table(columns, ([event[column] for column in columns] for event in timeline))


@dlq.command(epilog="Example: interviews dlq replay 7   or: interviews dlq replay --reason unknown_user --dry-run")
@chosen(OPEN_STATUSES, "open")
@click.option("--dry-run", is_flag=True, help="Only show what would be replayed.")
@click.option("--rate", type=Number(0.1), default=500.0, show_default=True, help="Letters a second at most.")
@click.option(
    "--fail-limit", type=Number(0, 1), default=0.5, show_default=True,
    help="Stop when a larger share of the first 1, 11, 111 letters fails again.",
)  # fmt: skip
@click.option("--no-ladder", is_flag=True, help="Replay all at once, without looking at the first ones.")
@click.option("--wait", type=Number(0), default=60.0, show_default=True, help="Seconds to wait for outcomes.")
@click.option("--note", type=Words(), help="Why; it is kept in the audit.")
@by_option
def replay(
    ids: tuple[int, ...], everything: bool, yes: bool, dry_run: bool, rate: float, fail_limit: float,
    no_ladder: bool, wait: float, note: str | None, actor: str, **options: str | None,
) -> None:  # fmt: skip
    """Publish dead letters again, and tell what became of them.

    Mend the cause first: create the user, deploy the worker, apply the SQL. A first letter goes alone, then ten, then
    a hundred, then all; it stops when too many fail again. Ctrl-C stops it, too; run it again to go on. Exit status 1
    when some failed again or not all were replayed.
    """
    settings = load_settings()
    letters = _dead_letters(settings)
    wanted = _wanted(ids, everything, options)
    found = _chosen(letters, wanted, "replayed", dry_run=dry_run, ask=everything and not yes and not dry_run)
    if dry_run:
        return
    action = Action("replay", actor, wanted, note)
    steps = letters.replay(
        action, found.ids, EventStream(open_redis(settings), settings.stream),
        rate=rate, ladder=() if no_ladder else LADDER, fail_limit=fail_limit, wait_seconds=wait,
    )  # fmt: skip
    last, interrupted = _watched(steps)
    _tell_outcomes(letters, last)
    _tell_progress(last)
    if interrupted or last.stopped:
        why = "interrupted" if interrupted else f"stopped: {last.stopped}"
        click.echo(f"{why}; {last.left} are left as they were: run it again to go on", err=True)
    sys.exit(1 if last.failed or interrupted or last.stopped else 0)


@dlq.command(epilog="Example: interviews dlq edit 7 --set data.user_id=UUID --note 'the engine sent the wrong user'")
@click.argument("id", type=letter_id)
@click.option("--set", "changes", multiple=True, metavar="PATH=VALUE", help="A field and its value, as JSON or text.")
@click.option("--note", type=Words(), required=True, help="Why; it is kept with the letter and in the audit.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@by_option
def edit(id: int, changes: tuple[str, ...], note: str, yes: bool, actor: str) -> None:  # noqa: A002 - as in show
    """Correct a dead letter's event, in $EDITOR or by --set, and apply it in the letter's stead.

    The letter is closed as replaced in the same transaction. Nothing changes where the new event is rejected.
    """
    letters = _dead_letters(load_settings())
    letter = _existing(letters, id)
    if letter["status"] not in OPEN_STATUSES:
        raise WorkerError(f"dead letter {id} is {letter['status']}, not open: nothing changed")
    before = _pretty(original_bytes(letter["event"]))
    after = _changed(before, changes) if changes else click.edit(before, extension=".json")
    if after is None or after.strip() == before.strip():
        click.echo("nothing changed")
        return
    _print_diff(before, after)
    if not yes:
        click.confirm("apply it?", abort=True, err=True)
    action = Action("edit", actor, Filter(status=None, ids=(id,)), note)
    answer = letters.edit(action, id, after.encode())
    click.echo(f"{id} replaced by {answer['id']}: {answer['outcome']}")


@dlq.command(epilog="Example: interviews dlq discard 7 --note 'test session of the engine'")
@chosen(OPEN_STATUSES, "open")
@click.option("--note", type=Words(), required=True, help="Why; it is kept with the letter and in the audit.")
@by_option
def discard(ids: tuple[int, ...], everything: bool, yes: bool, note: str, actor: str, **options: str | None) -> None:
    """Close dead letters without applying them. They are kept: 'interviews dlq restore' opens them again."""
    _move("discard", ids, everything, yes, note, actor, options)


@dlq.command(epilog="Example: interviews dlq restore 7 --note 'it was no test session'")
@chosen(("discarded",), "discarded")
@click.option("--note", type=Words(), help="Why; it is kept in the audit.")
@by_option
def restore(
    ids: tuple[int, ...], everything: bool, yes: bool, note: str | None, actor: str, **options: str | None
) -> None:
    """Open discarded dead letters again."""
    _move("restore", ids, everything, yes, note, actor, options)


@dlq.command(epilog="Example: interviews dlq export --reason rejected > events.jsonl")
@filtered(ALL_STATUSES, "open")
def export(**options: str | None) -> None:
    """Write the events of dead letters as JSON lines; 'interviews publish --unchecked' takes them back.

    What is not JSON cannot be a line of it, and is left out and counted; 'interviews dlq show' has it.
    """
    letters = _dead_letters(load_settings())
    left_out = 0
    for _, raw in letters.events(letters.choose(_filter(options)).ids):
        if _is_json(raw):
            click.echo(raw.replace(b"\n", b" "))  # between tokens, or it were no JSON; all else as it was received
        else:
            left_out += 1
    if left_out:
        click.echo(f"{left_out} left out: not JSON", err=True)


@dlq.command(epilog="Example: interviews dlq audit --limit 10")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True)
@json_option
def audit(limit: int, as_json: bool) -> None:
    """Show who did what to the dead letters, the latest first."""
    actions = _dead_letters(load_settings()).audit(limit=limit)
    if as_json:
        print_json(actions)
        return
    if not actions:
        click.echo("nobody has done anything yet")
        return
    rows = (
        {"began": _moment(each["began_at"]), "actor": each["actor"], "action": each["action"],
         "letters": each["letters"], "outcomes": _listed(each["outcomes"]), "filter": _listed(each["filter"]),
         "note": each["note"]}
        for each in actions
    )  # fmt: skip
    _print_rows(rows, (("began", "actor"), ("action",), ("letters",), ("outcomes",), ("filter", "note")))


# ------------------------------------------------------------------------------------------------- which letters


def _dead_letters(settings: Settings) -> DeadLetters:
    return DeadLetters(open_database(settings))


def _filter(options: dict[str, str | None]) -> Filter:
    told: dict[str, Any] = {name: None if value is None else str(value) for name, value in options.items()}
    told["type"] = told.pop("type_")
    return Filter(**told | {"status": None if told["status"] == "all" else told["status"]})


def _wanted(ids: tuple[int, ...], everything: bool, options: dict[str, str | None]) -> Filter:
    """The filter that arguments and options make; exactly one way of naming letters is allowed."""
    named = any(value for name, value in options.items() if name != "status")
    if bool(ids) + everything + named != 1:
        raise click.UsageError("name dead letters by ID, by a filter as --reason, or all of them by --all")
    if ids:
        return Filter(status=None, ids=ids)
    return _filter(options)


def _existing(letters: DeadLetters, letter_id: int) -> Letter:
    found = letters.get([letter_id])
    if not found:
        raise WorkerError(f"no dead letter {letter_id}: see 'interviews dlq list --status all'")
    return found[0]


def _chosen(letters: DeadLetters, wanted: Filter, done: str, *, dry_run: bool, ask: bool) -> Chosen:
    """The letters that are meant; shown for a dry run and before a question."""
    found = letters.choose(wanted)
    missing = sorted(set(wanted.ids or ()) - set(found.ids))
    if missing:
        raise WorkerError(f"no dead letter {', '.join(map(str, missing))}: see 'interviews dlq list --status all'")
    if dry_run or ask:
        click.echo(f"{len(found.ids)} would be {done}; the oldest failed first at {_moment(found.oldest)}", err=ask)
        for letter in letters.get(found.ids[:SAMPLE]):
            told = f"  {letter['id']}: {letter['reason']}, {letter['type']}, {letter['session_id']}: {letter['detail']}"
            click.echo(printable(told), err=ask)
    if ask:
        click.confirm("go on?", abort=True, err=True)
    return found


def _move(
    kind: Literal["discard", "restore"], ids: tuple[int, ...], everything: bool, yes: bool,
    note: str | None, actor: str, options: dict[str, str | None],
) -> None:  # fmt: skip
    letters = _dead_letters(load_settings())
    wanted = _wanted(ids, everything, options)
    found = _chosen(letters, wanted, f"{kind.rstrip('e')}ed", dry_run=False, ask=everything and not yes)
    action = Action(kind, actor, wanted, note)
    moved = letters.discard(action, found.ids) if kind == "discard" else letters.restore(action, found.ids)
    why = "not open" if kind == "discard" else "not discarded, or its event is in an open letter"
    for unmoved in sorted(set(found.ids) - set(moved)):
        click.echo(f"{unmoved}: {why}, left as it is", err=True)
    click.echo(f"{len(moved)} {kind.rstrip('e')}ed")


# ----------------------------------------------------------------------------------------------------- replaying


def _watched(steps: Generator[Replay, None, None]) -> tuple[Replay, bool]:
    """Go through a replay, with a progress bar; answer how it stands at the end, and whether Ctrl-C ended it."""
    last = next(steps)
    try:
        with _interruptible() as interrupted, progress_bar() as progress:
            task = progress.add_task("", total=last.asked)
            for last in steps:
                told = f"{last.applied} applied, {len(last.failed)} failed again"
                progress.update(task, completed=last.published + len(last.unmoved), description=told)
                if interrupted.is_set():
                    steps.close()
    except (WorkerError, redis.RedisError):
        if last.published:
            _tell_progress(last)
            click.echo(f"{last.left} are left as they were: run it again to go on", err=True)
        raise
    return last, interrupted.is_set()


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Let Ctrl-C set an event, so that the batch at hand is published; a second one interrupts at once."""
    asked = threading.Event()
    usual = signal.getsignal(signal.SIGINT)

    def ask(*_: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, usual)


def _tell_outcomes(letters: DeadLetters, replay: Replay) -> None:
    for unmoved in replay.unmoved[:SHOWN]:
        click.echo(f"{unmoved}: not open, left as it is", err=True)
    for letter in letters.get(replay.failed[:SHOWN]):
        click.echo(printable(f"{letter['id']}: failed again, {letter['reason']}: {letter['detail']}"), err=True)
    for kind, ids in (("not open, left as they are", replay.unmoved), ("failed again", replay.failed)):
        if len(ids) > SHOWN:
            click.echo(f"and {len(ids) - SHOWN} more {kind}", err=True)


def _tell_progress(replay: Replay) -> None:
    outcomes = f"{replay.applied} applied, {len(replay.failed)} failed again, {len(replay.under_way)} under way"
    click.echo(f"{replay.published} replayed: {outcomes}")


# ------------------------------------------------------------------------------------------------------- telling


def _moment(told: str | None) -> str:
    return "-" if told is None else datetime.fromisoformat(told).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _listed(told: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_shortened(value)}" for name, value in told.items())


def _shortened(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    more = f" and {len(value) - SHOWN} more" if len(value) > SHOWN else ""
    return " ".join(map(str, value[:SHOWN])) + more


def _print_rows(rows: Iterable[dict[str, object]], narrow: Sequence[tuple[str, ...]]) -> None:
    """A column for each value; where the screen is narrow, those that stand together in `narrow` share one."""
    listed = list(rows)
    columns = [(name,) for name in listed[0]] if screen().width >= WIDE else narrow
    print_table(
        [" / ".join(column) for column in columns],
        (
            [
                row[column[0]] if len(column) == 1 else "\n".join(str(row[name] or "-") for name in column)
                for column in columns
            ]
            for row in listed
        ),
    )


def _pretty(raw: bytes) -> str:
    try:
        return _indented(json.loads(raw))
    except (ValueError, RecursionError):
        return raw.decode(errors="backslashreplace")


def _is_json(raw: bytes) -> bool:
    def no_number(constant: str) -> None:
        raise ValueError(constant)  # NaN and Infinity are Python's

    try:
        json.loads(raw.decode(), parse_constant=no_number)
    except (ValueError, RecursionError):
        return False
    return True


def _indented(value: Any) -> str:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return text if text.encode(errors="replace").decode() == text else json.dumps(value, indent=2) + "\n"


def _changed(before: str, changes: tuple[str, ...]) -> str:
    try:
        event = json.loads(before)
    except (ValueError, RecursionError):
        raise click.UsageError("this event is not JSON: edit it without --set") from None
    for change in changes:
        path, equals, value = change.partition("=")
        *folders, name = path.split(".")
        if not equals or not isinstance(event, dict):
            raise click.BadParameter(f"{change!r} is not PATH=VALUE, as data.user_id=UUID", param_hint="--set")
        place = event
        for folder in folders:
            place = place.setdefault(folder, {})
            if not isinstance(place, dict):
                raise click.BadParameter(f"{folder} in {path} is no object", param_hint="--set")
        try:
            place[name] = json.loads(value)
        except (ValueError, RecursionError):
            place[name] = value
    return _indented(event)


def _print_diff(before: str, after: str) -> None:
    for line in difflib.unified_diff(
        before.splitlines(), after.splitlines(), "as it was", "as it will be", lineterm=""
    ):
        colour = {"+": "green", "-": "red"}.get(line[:1])
        click.secho(printable(line), fg=colour, err=True)
