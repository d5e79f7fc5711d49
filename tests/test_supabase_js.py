"""The real supabase-js calls the RPCs and views as a front end would: see tests/supabase_js/examples.mjs."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.database import Database
from worker.embedded import Stack

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "tests" / "supabase_js" / "examples.mjs"
CLIENT = ROOT / "node_modules" / "@supabase" / "supabase-js" / "package.json"
USERS = 40  # more than the examples sign in
PATIENCE_SECONDS = 120


@pytest.fixture
def environment(stack: Stack, database: Database) -> Iterator[dict[str, str]]:
    """What client.mjs reads: where PostgREST is, the keys, and users who can sign in; they are gone afterwards."""
    ids = [database.create_user() for _ in range(USERS)]
    users = [
        {"id": str(each), "email": f"{each}@example.com", "jwt": stack.token("authenticated", user_id=str(each))}
        for each in ids
    ]
    yield {
        "SUPABASE_URL": stack.environment["SUPABASE_URL"],
        "SUPABASE_ANON_KEY": stack.token("anon"),
        "SUPABASE_SECRET_KEY": stack.environment["SUPABASE_SECRET_KEY"],
        "TEST_USERS": json.dumps(users),
    }
    database.connection.execute("delete from auth.users where id = any(%s)", (ids,))


def run_with_node(file: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a file's tests with node's own runner."""
    node = shutil.which("node")
    if node is None or not CLIENT.is_file():
        pytest.fail("supabase-js or node (20 or newer) is missing: run 'make setup'", pytrace=False)
    return subprocess.run(
        [node, "--test", "--test-reporter=tap", file],
        env={**os.environ, **environment},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        check=False,
        timeout=PATIENCE_SECONDS,
    )


def test_the_seeds_examples_and_every_refusal_are_what_a_front_end_developer_expects(
    environment: dict[str, str],
) -> None:
    done = run_with_node(EXAMPLES, environment)

    if done.returncode != 0:
        pytest.fail(done.stdout, pytrace=False)
    counts = {name: int(number) for name, number in re.findall(r"^# (\w+) (\d+)$", done.stdout, re.MULTILINE)}
    assert counts["tests"] == counts["pass"] > 1, done.stdout  # none skipped, none left out
