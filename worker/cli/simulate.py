"""`interviews simulate`: a realistic load of interviews that never were."""

import itertools
import math
import os
import random
import signal
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Final

import click

from worker.cli.screen import progress_bar
from worker.cli.servers import open_redis
from worker.errors import SettingsError, WorkerError
from worker.settings import StreamSettings, load_settings
from worker.simulate import Simulated, email_of, simulated
from worker.stream import EventStream

BATCH: Final = 500  # events at most in one round trip
BEAT_SECONDS: Final = 0.1  # from one round trip to the next, or longer at less than one event in it
MAX_SESSIONS: Final = 10_000_000
MADE_USERS: Final = 10  # where none is given


def _finite(_context: click.Context, _parameter: click.Parameter, value: float) -> float:
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number.")
    return value


def _day(_context: click.Context, _parameter: click.Parameter, value: datetime | None) -> datetime:
    """Midnight UTC; of today where none is given."""
    day = (value or datetime.now(UTC)).replace(hour=0, minute=0, second=0, microsecond=0, tzinfo=UTC)
    if day.year < 2000:  # that many interviews before it would begin before the year 1
        raise click.BadParameter(f"{day:%Y-%m-%d} is before 2000.")
    return day


@click.command(epilog="Example: interviews simulate --sessions 1000 --rate 200 --bad 0.02")
@click.option("--sessions", type=click.IntRange(1, MAX_SESSIONS), default=100, show_default=True, help="Interviews.")
@click.option(
    "--rate",
    type=click.FloatRange(min=0),
    callback=_finite,
    default=100,
    show_default=True,
    help="Events per second; 0: as fast as possible.",
)
@click.option(
    "--shuffle",
    type=click.FloatRange(0, 1),
    callback=_finite,
    default=0.1,
    show_default=True,
    help="Share of events that arrive late, after others of their interview.",
)
@click.option(
    "--repeat",
    type=click.FloatRange(0, 1),
    callback=_finite,
    default=0.05,
    show_default=True,
    help="Share of events that are published twice.",
)
@click.option(
    "--bad",
    type=click.FloatRange(0, 1, max_open=True),
    callback=_finite,
    default=0.0,
    show_default=True,
    help="Share of malformed events among all: dead letters of several reasons. From about 0.5 on the workers hold.",
)
@click.option(
    "--user", "users", type=click.UUID, multiple=True, metavar="UUID", help="A user who exists; may be repeated."
)
@click.option(
    "--seed", type=click.IntRange(min=0), help="Of all that is random: the same seed and day, the same events."
)
@click.option(
    "--until",
    type=click.DateTime(["%Y-%m-%d"]),
    callback=_day,
    metavar="YYYY-MM-DD",
    help="The day before which the last interview ended.  [default: today]",
)
def simulate(
    sessions: int,
    rate: float,
    shuffle: float,
    repeat: float,
    bad: float,
    users: tuple[uuid.UUID, ...],
    seed: int | None,
    until: datetime,
) -> None:
    """Publish interviews that never were: a realistic load, to see a stack work.

    Some 25 interviews are under way at once, of 8 to 15 questions with 1 to 5 minutes each in the events' own time;
    most are finished and scored, some cancelled, some left unfinished. Their sessions are named sim-….

    Where no --user is given, DATABASE_URL must name the database of 'interviews up', and users are made there.
    Ctrl-C ends with status 1 and says how far it came.
    """
    settings = load_settings(StreamSettings)
    seed = random.SystemRandom().getrandbits(32) if seed is None else seed
    rng = random.Random(seed)  # noqa: S311 - to be drawn again, not a secret
    stream = EventStream(open_redis(settings), settings.stream)
    events = simulated(sessions, users or _made_users(rng), rng, until=until, shuffle=shuffle, repeat=repeat, bad=bad)
    published: Counter[str] = Counter()
    try:
        with progress_bar() as progress, _interruptible() as interrupted:
            task = progress.add_task("interviews ended", total=sessions)
            for batch in _paced(events, rate, interrupted):
                stream.add([event.raw for event in batch])
                published.update(event.kind for event in batch)
                published["ended"] += sum(event.ends for event in batch)
                progress.update(task, completed=published["ended"])
    finally:
        if published:
            click.echo(f"{_told(published, sessions)} (--seed {seed} --until {until:%Y-%m-%d})")
    if interrupted.is_set():
        click.echo("interviews: stopped by Ctrl-C", err=True)
        sys.exit(1)


def _told(published: Counter[str], sessions: int) -> str:
    interviews = f"{sessions}" if published["ended"] == sessions else f"{published['ended']} of {sessions}"
    return (
        f"{interviews} interviews, {published['event']} events published,"
        f" {published['repeat']} of them twice, and {published['bad']} bad ones"
    )


def _paced(events: Iterator[Simulated], rate: float, interrupted: threading.Event) -> Iterator[list[Simulated]]:
    """The events in batches, each when it is its time, until interrupted; a late one is caught up with."""
    size = max(1, min(BATCH, int(rate * BEAT_SECONDS))) if rate else BATCH
    began, count = time.monotonic(), 0
    while not interrupted.is_set() and (batch := list(itertools.islice(events, size))):
        yield batch
        count += len(batch)
        if rate:
            left = began + count / rate - time.monotonic()
            interrupted.wait(min(max(0.0, left), threading.TIMEOUT_MAX))


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """What Ctrl-C sets, so that no batch is cut in two; a second Ctrl-C ends at once."""
    interrupted = threading.Event()

    def interrupt(*_: object) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _made_users(rng: random.Random) -> list[uuid.UUID]:
    """Users in the embedded stack's auth.users; those of the same seed may be there already."""
    url = os.environ.get("DATABASE_URL")
    if not url:
        raise SettingsError("whose interviews? Give --user UUID, or set DATABASE_URL ('interviews up' prints it)")
    try:
        import psycopg  # an extra: with --user it is not needed
    except ImportError as error:
        raise WorkerError(
            "psycopg is not installed: give --user, or pip install 'interview-worker[embedded]'"
        ) from error

    users = [uuid.UUID(int=rng.getrandbits(128), version=4) for _ in range(MADE_USERS)]
    try:
        with psycopg.connect(url, connect_timeout=5) as connection:
            if connection.execute(_HAS_TOKENS).fetchone():
                raise SettingsError(
                    "DATABASE_URL is a real Supabase project, where users must sign up: give --user UUID"
                )
            connection.execute(  # one statement: executemany logs a line of its own where it fails
                "insert into auth.users (id, email) select * from unnest(%s::uuid[], %s::text[])"
                " on conflict do nothing",
                [users, [email_of(user) for user in users]],
            )
    except psycopg.Error as error:  # its message may quote the URL
        raise WorkerError(
            f"DATABASE_URL: no users made ({type(error).__name__}); is it right, and Postgres up?"
        ) from None
    return users


# Supabase Auth reads every row of its own auth.users, and fails on one without tokens.
_HAS_TOKENS: Final = """
    select 1 from information_schema.columns
    where table_schema = 'auth' and table_name = 'users' and column_name = 'confirmation_token'
"""
