"""`make demo`: the main job from beginning to end, on real servers, in half a minute.

Sample interviews, some shuffled, some twice, one of an unknown user, one event cut in half, are published; a
Celery worker applies them; the dead letters are shown, one is repaired and replayed; then a crowd shows the speed.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, LiteralString

import psycopg
from psycopg.rows import dict_row
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table

from worker.database import Database
from worker.dlq import Action, DeadLetters, Filter
from worker.embedded import Stack, StackError
from worker.settings import load_settings
from worker.stream import EventStream, connect

SAMPLES = Path(__file__).parent / "samples" / "interviews.jsonl"
LATE_USER = ("00000000-0000-4000-8000-000000000013", "tim@example.com")
SAMPLE_RATE = 40.0  # events per second: slow enough to watch
CROWD = 150  # times the sample interviews, for the speed
PATIENCE_SECONDS = 60.0
STATUS_COLOURS = {"completed": "green", "in_progress": "yellow", "cancelled": "red"}


class Demo:
    """The stage: servers, a worker, and what a person sees."""

    def __init__(self, stack: Stack, console: Console) -> None:
        self.console = console
        settings = load_settings()
        self.stream = EventStream(connect(settings), settings.stream)
        self.letters = DeadLetters(Database(settings))
        self.connection = psycopg.connect(stack.database_url, autocommit=True, row_factory=dict_row)

    def run(self) -> None:
        """All four acts; raises StackError where one does not come to its end."""
        lines = SAMPLES.read_bytes().splitlines()
        self._sign_up(lines)
        self.console.rule("[bold]1  An engine publishes, a worker applies")
        self._publish_slowly(lines)
        self.console.rule("[bold]2  What could not be applied is kept, with the reason")
        self._show_dead_letters()
        self.console.rule("[bold]3  The cause is mended, the letter replayed")
        self._repair_and_replay()
        self.console.rule("[bold]4  A crowd")
        rate = self._crowd(lines)
        self._sum_up(len(lines), rate)

    def _sign_up(self, lines: list[bytes]) -> None:
        """Create the users of the sample interviews, but for the late one."""
        known = {
            (data["user_id"], data["email"])
            for event in _readable(lines)
            if "user_id" in (data := event["data"]) and data["user_id"] != LATE_USER[0]
        }
        for user in sorted(known):
            self.connection.execute("insert into auth.users (id, email) values (%s, %s)", user)

    def _publish_slowly(self, lines: list[bytes]) -> None:
        self.console.print(f"{len(lines)} events of {SAMPLES.name}: some shuffled, some twice, two of them bad\n")
        with Live(self._sessions(), console=self.console, refresh_per_second=8, transient=False) as live:
            for line in lines:
                self.stream.add([line])
                time.sleep(1 / SAMPLE_RATE)
                live.update(self._sessions())
            self._wait(lambda: self.stream.state().length == 0, "the stream to empty")
            live.update(self._sessions())
        self.console.print()

    def _show_dead_letters(self) -> None:
        table = Table(box=None, header_style="bold")
        for column in ("id", "reason", "detail", "session"):
            table.add_column(column)
        for letter in self.letters.find(Filter(), limit=50):
            table.add_row(str(letter["id"]), letter["reason"], letter["detail"], letter["session_id"] or "?")
        self.console.print(table)
        waiting = self._one("select count(*) as n from public.interview_events where applied_at is null")["n"]
        self.console.print(f"\n{waiting} events of session_api_1013 wait for its start: nothing is lost\n")

    def _repair_and_replay(self) -> None:
        wanted = Filter(reason="unknown_user")
        (letter,) = self.letters.find(wanted, limit=2)
        self.connection.execute("insert into auth.users (id, email) values (%s, %s)", LATE_USER)
        self.console.print("the user signs up      insert into auth.users …")
        self.console.print(f"the letter is replayed interviews dlq replay {letter['id']}")
        action = Action("replay", actor="demo", filter=wanted, note="the user exists now")
        for _ in self.letters.replay(action, [letter["id"]], self.stream, rate=100):
            pass
        self._wait(lambda: self.letters.get([letter["id"]])[0]["status"] == "resolved", "the replay to be applied")
        self.console.print("its story is complete\n")
        self.console.print(self._sessions(only=letter["session_id"]))
        self.console.print()

    def _crowd(self, lines: list[bytes]) -> float:
        """Publish the sample interviews many times over as new sessions; answer the events applied per second."""
        events = list(_readable(lines))
        crowd = [json.dumps(event).encode() for nth in range(CROWD) for event in _copies(events, nth)]
        before = self._applied()
        began = time.monotonic()
        for start in range(0, len(crowd), 1000):
            self.stream.add(crowd[start : start + 1000])
        self._wait(lambda: self.stream.state().length == 0, "the crowd to be applied")
        seconds = time.monotonic() - began
        applied = self._applied() - before
        self.console.print(f"{len(crowd)} events published and applied in {seconds:.1f} s\n")
        return applied / seconds

    def _sum_up(self, samples: int, rate: float) -> None:
        counts = self._one(
            "select count(*) as sessions, count(*) filter (where interview_status = 'completed') as completed"
            " from public.interview_sessions"
        )
        ledger, dead = self._applied(), sum(self.letters.counts()["open"].values())
        self.console.print(
            Panel(
                f"{counts['sessions']} sessions, {counts['completed']} of them completed\n"
                f"{ledger} events applied, each once; {dead} dead letter open: the one cut in half\n"
                f"[bold]{rate:,.0f} events/s[/bold] from publish to commit, on this machine, one worker",
                title="Summary",
                expand=False,
            )
        )
        self.console.print(f"{samples} sample events told their story. Next: interviews up, or README.md")

    def _sessions(self, only: str = "session_api_10%") -> Table:
        table = Table(box=None, header_style="bold")
        for column in ("session", "user", "status", "questions", "minutes", "score"):
            table.add_column(column, justify="right" if column in {"minutes", "score"} else "left")
        for row in self._all(
            "select * from public.interview_sessions where session_id like %s order by session_id", only
        ):
            total = row["total_questions"] or 0
            done = "█" * row["questions_answered"] + "░" * max(0, total - row["questions_answered"])
            colour = STATUS_COLOURS[row["interview_status"]]
            status = f"[{colour}]{row['interview_status']}[/{colour}]"
            score = "" if row["score"] is None else f"{row['score']:.1f}"
            table.add_row(row["session_id"], row["email"], status, done, str(row["duration_minutes"]), score)
        return table

    def _applied(self) -> int:
        return int(self._one("select count(*) as n from public.interview_events where applied_at is not null")["n"])

    def _all(self, query: LiteralString, *parameters: object) -> list[dict[str, Any]]:
        return self.connection.execute(query, parameters).fetchall()

    def _one(self, query: LiteralString, *parameters: object) -> dict[str, Any]:
        return self._all(query, *parameters)[0]

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise StackError(f"waited {PATIENCE_SECONDS:.0f} s for {what} in vain: see the worker's log above")
            time.sleep(0.02)


def _readable(lines: list[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _copies(events: list[dict[str, Any]], nth: int) -> Iterator[dict[str, Any]]:
    """The same interviews as other sessions: new ids, the same for the same event."""
    for event in events:
        new_id = uuid.uuid5(uuid.UUID(event["id"]), str(nth))
        yield {**event, "id": str(new_id), "subject": f"crowd_{nth}_{event['subject']}"}


@contextmanager
def running_worker(environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A Celery worker as its users start it; stopped by SIGTERM at the end."""
    celery = Path(sys.executable).parent / "celery"
    with log.open("wb") as output:
        worker = subprocess.Popen(  # noqa: S603 - our own argument list, no shell
            [str(celery), "-A", "worker", "worker"],
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield worker
    finally:
        worker.terminate()
        try:
            worker.wait(30)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def main() -> int:
    """Run the demo; 0 where every act came to its end."""
    console = Console(highlight=False)
    folder = Path(tempfile.mkdtemp(prefix="interviews-demo-"))
    log = folder / "worker.log"
    began = time.monotonic()
    try:
        with Stack(folder / "stack", temporary=True) as stack:
            os.environ.update(stack.environment)
            console.print(f"Postgres, PostgREST and Redis are up after {time.monotonic() - began:.1f} s")
            with running_worker(stack.environment, log):
                Demo(stack, console).run()
    except StackError as error:
        if log.exists():
            console.print(log.read_text(), markup=False)
        console.print(f"demo: {error}", style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("demo: interrupted, everything stopped")
        return 130
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
