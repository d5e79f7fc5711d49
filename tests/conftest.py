"""Fixtures on real servers: one embedded stack for the whole run, fresh users and names for each test.

And one promise kept by the whole run: no log that it leaves holds personal data or a secret.
"""

import base64
import os
import random
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, urlsplit

import psycopg
import pytest
from psycopg.rows import dict_row

from tests.database import Database
from tests.stories import PERSONAL
from tests.worker_process import Workers, workers_on
from worker.embedded import Stack


@dataclass
class Leaks:
    """Finds what no log may hold: what the stories tell about a person, and the secrets of the stack."""

    forbidden: dict[str, str] = field(default_factory=lambda: dict(PERSONAL), repr=False)  # kind to text

    def learn(self, environment: Mapping[str, str]) -> None:
        """Forbid the secrets in a stack's settings, too."""
        self.forbidden["the Supabase key"] = environment["SUPABASE_SECRET_KEY"]
        for name, kind in (("REDIS_URL", "Redis' password"), ("DATABASE_URL", "Postgres' password")):
            self.forbidden[kind] = str(urlsplit(environment[name]).password)

    def in_text(self, text: str | bytes) -> list[str]:
        """The kinds of what is found, in plain, in an URL's or in base64's spelling; never what is found."""
        found = text if isinstance(text, bytes) else text.encode()
        return [kind for kind, told in self.forbidden.items() if any(each in found for each in _spellings(told))]

    def in_folder(self, folder: Path) -> list[str]:
        """One line for each log in the folder, or below it, and each kind that it holds.

        Postgres' own is left out: it quotes the statements that our tests type.
        """
        return [
            f"{log.relative_to(folder)} holds {kind}"
            for log in sorted(folder.rglob("*.log"))
            if log.name != "postgres.log"
            for kind in self.in_text(log.read_bytes())
        ]


def _spellings(told: str) -> set[bytes]:
    """Plain, quoted, and what base64 makes of it at each of the three places where it may begin."""
    raw = told.encode()
    encoded = {
        base64.b64encode(bytes(shift) + raw)[-(-shift * 4 // 3) : (shift + len(raw)) * 4 // 3] for shift in range(3)
    }
    return {raw, quote(told, safe="").encode(), *encoded}


def assert_no_leak(leaks: Leaks, folder: Path) -> None:
    if found := leaks.in_folder(folder):
        pytest.fail("\n".join(["what no log may hold:", *found]), pytrace=False)


@pytest.fixture(scope="session")
def leaks() -> Leaks:
    """What the run has learnt of what no log may hold."""
    return Leaks()


@pytest.fixture(scope="session", autouse=True)
def _no_log_of_the_run_leaks(tmp_path_factory: pytest.TempPathFactory, leaks: Leaks) -> Iterator[None]:
    """After the last test: the workers' logs, and those of the servers whose folders are still there."""
    yield
    assert_no_leak(leaks, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory, leaks: Leaks) -> Iterator[Stack]:
    """Postgres with our SQL, PostgREST and Redis; INTERVIEW_TEST_POSTGRES chooses the version (15, 16 or 18)."""
    version = int(os.environ.get("INTERVIEW_TEST_POSTGRES", "18"))
    folder = Path(tmp_path_factory.mktemp("stack")) / "stack"
    with Stack(folder, postgres_version=version, temporary=True) as running:
        leaks.learn(running.environment)
        yield running
        assert_no_leak(leaks, running.folder / "log")  # before the folder is removed


@pytest.fixture
def database(stack: Stack) -> Iterator[Database]:
    """A superuser's connection with the few calls that tests of the SQL need."""
    with psycopg.connect(stack.database_url, autocommit=True, row_factory=dict_row) as connection:
        yield Database(connection)


@pytest.fixture
def rng() -> random.Random:
    """What a test draws from; pytest shows its seed where the test fails."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.fixture
def user(database: Database) -> uuid.UUID:
    """A user who may be interviewed."""
    return database.create_user()


@pytest.fixture
def workers(stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workers]:
    """Starts real Celery workers on an empty stream."""
    with workers_on(stack, tmp_path, monkeypatch) as workers:
        yield workers
