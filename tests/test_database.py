"""What Supabase and its gateways answer, in the words of worker.errors: hold, hold until mended, or halve."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from worker.database import Database
from worker.errors import Misconfigured, RefusedCall, Unavailable, WorkerError
from worker.settings import Settings

Answer = tuple[int, dict[str, str], bytes]  # status, headers, body


class Gateway(HTTPServer):
    answer: Answer = (200, {}, b"")


class Handler(BaseHTTPRequestHandler):
    server: Gateway

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        status, headers, body = self.server.answer
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        """Nothing."""


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    with Gateway(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def database(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    monkeypatch.setenv("REDIS_URL", "redis://x")
    monkeypatch.setenv("SUPABASE_URL", f"http://127.0.0.1:{gateway.server_port}")
    monkeypatch.setenv("SUPABASE_SECRET_KEY", "key")
    database = Database(Settings())
    yield database
    database.close()


def told(status: int, code: str = "", message: str = "words with data in them") -> Answer:
    return status, {"Content-Type": "application/json"}, json.dumps({"code": code, "message": message}).encode()


def error(gateway: Gateway, database: Database, answer: Answer) -> WorkerError:
    gateway.answer = answer
    with pytest.raises(WorkerError) as caught:
        database.apply_events([{}])
    return caught.value


HTML = {"Content-Type": "text/html"}


@pytest.mark.parametrize("answer", [
    told(500), told(503, "PGRST001"), told(504, "PGRST003"), told(429), told(500, "XX000"), told(500, "40P01"),
    told(503, "57P03"), (502, HTML, b"<h1>Bad gateway</h1>"), (200, {"Content-Type": "application/json"}, b"[]"),
    (200, {"Content-Type": "application/json"}, b'{"outcome": "applied"}'),
])  # fmt: skip
def test_an_ill_supabase_is_waited_for(gateway: Gateway, database: Database, answer: Answer) -> None:
    assert type(error(gateway, database, answer)) in {Unavailable, *Unavailable.__subclasses__()} - {Misconfigured}


def test_an_answer_that_is_no_json_is_no_empty_one(gateway: Gateway, database: Database) -> None:
    gateway.answer = 200, {"Content-Type": "application/json"}, b"["
    with pytest.raises(Unavailable, match="not JSON"):
        database.apply_events([])


@pytest.mark.parametrize(("answer", "remedy"), [
    (told(401), "SUPABASE_SECRET_KEY"),
    (told(403), "SUPABASE_SECRET_KEY"),
    (told(401, "PGRST301"), "SUPABASE_SECRET_KEY"),
    (told(401, "42501"), "SUPABASE_SECRET_KEY"),  # the public key's role lacks the grant, and shall
    (told(400, "22023", 'role "nobody" does not exist'), "SUPABASE_SECRET_KEY"),
    (told(403, "42501"), "run again"),
    (told(404, "PGRST202"), "notify pgrst"),
    (told(300, "PGRST203"), "sql/supabase_worker_interview_events.sql"),
    (told(404, "42883"), "sql/supabase_worker_interview_events.sql"),
    (told(404), "SUPABASE_URL"),
    ((301, {"Location": "https://elsewhere"}, b""), "SUPABASE_URL"),
    ((200, HTML, b"<h1>Welcome</h1>"), "SUPABASE_URL"),
])  # fmt: skip
def test_a_misconfigured_supabase_names_what_mends_it(
    gateway: Gateway, database: Database, answer: Answer, remedy: str
) -> None:
    found = error(gateway, database, answer)
    assert isinstance(found, Misconfigured)
    assert remedy in found.remedy
    assert "words with data" not in f"{found}{found.remedy}"


@pytest.mark.parametrize("answer", [
    told(400, "22P05"), told(400, "23514"), told(400, "22023"), told(500, "57014"), told(400, "54000"), (413, {}, b""),
])  # fmt: skip
def test_a_call_refused_for_its_data_is_halved(gateway: Gateway, database: Database, answer: Answer) -> None:
    found = error(gateway, database, answer)
    assert isinstance(found, RefusedCall)
    assert "words with data" not in str(found)


def test_our_own_refusals_are_told_in_their_words(gateway: Gateway, database: Database) -> None:
    assert str(error(gateway, database, told(409, "PT409", "not open"))) == "not open"


@pytest.mark.parametrize(("header", "seconds"), [("7", 7.0), ("100000", 60.0), ("soon", 0.0), ("", 0.0)])
def test_the_wish_to_be_left_alone_is_heard_within_reason(
    gateway: Gateway, database: Database, header: str, seconds: float
) -> None:
    found = error(gateway, database, (429, {"Retry-After": header}, b""))
    assert isinstance(found, Unavailable)
    assert found.retry_after == seconds
