"""TLS and passwords on the way to Redis: passed on by every client, checked by every client, told by none."""

import asyncio
import random
import socketserver
import ssl
import threading
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, urlsplit

import pytest
import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from kombu.exceptions import OperationalError

from events import AsyncPublisher, Event, Publisher, PublishError, parse_event
from tests.database import Database
from tests.stories import assert_rows_equal_their_stories, crowd, encoded
from tests.worker_process import STREAM, Workers, wait_until
from worker.app import make_app
from worker.embedded import Stack
from worker.settings import StreamSettings, load_settings
from worker.stream import EventStream, connect

USER = "user"
PASSWORD = "p@ss/w:o?r#d %&+"
SPELLINGS = (PASSWORD, quote(PASSWORD, safe=""), quote(PASSWORD))
TLS_HANDSHAKE = b"\x16"  # the first byte of what a client says in TLS
REFUSED = (redis.RedisError, OperationalError, PublishError, OSError)

# ------------------------------------------------------------------------------------------------ certificates


@dataclass(frozen=True)
class Authority:
    """Issues certificates in a folder; `file` is what those who trust it name."""

    folder: Path
    name: x509.Name
    key: ec.EllipticCurvePrivateKey

    @property
    def file(self) -> Path:
        return self.folder / "authority.pem"

    def issue(self, host: x509.GeneralName) -> Path:
        """A file with a certificate for one host and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        alternatives = x509.SubjectAlternativeName([host])
        certificate = _unsigned(self.name, _named("server"), key).add_extension(alternatives, critical=False)
        file = self.folder / f"{uuid.uuid4()}.pem"
        file.write_bytes(_pem(certificate.sign(self.key, hashes.SHA256())) + _key_pem(key))
        return file


def authority(folder: Path) -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    made = Authority(folder, _named(f"authority {uuid.uuid4()}"), key)
    may_sign = x509.BasicConstraints(ca=True, path_length=0)
    certificate = _unsigned(made.name, made.name, key).add_extension(may_sign, critical=True)
    made.file.write_bytes(_pem(certificate.sign(key, hashes.SHA256())))
    return made


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])


def _unsigned(issuer: x509.Name, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return x509.CertificateBuilder(
        issuer_name=issuer,
        subject_name=subject,
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=now - timedelta(days=1),
        not_valid_after=now + timedelta(days=1),
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


# ----------------------------------------------------------------------------------------------- TLS before Redis


class TlsProxy:
    """Terminates TLS before a Redis that has none, and counts the clients that trusted its certificate."""

    def __init__(self, certificate: Path, upstream: int) -> None:
        self.trusted_by = 0
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(certificate)
        self._upstream = upstream
        self._connections: set[asyncio.Task[Any]] = set()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _run(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._loop.set_exception_handler(lambda *_: None)  # a handshake that a client broke off
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        self.port: int = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.trusted_by += 1
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        behind, before = await asyncio.open_connection("127.0.0.1", self._upstream)
        with suppress(asyncio.CancelledError, OSError):
            async with asyncio.TaskGroup() as both:
                both.create_task(_copy(reader, before))
                both.create_task(_copy(behind, writer))
        for end in (writer, before):
            end.transport.abort()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


# --------------------------------------------------------------------------------------------------- the clients


def publishes(url: str, events: list[Event]) -> None:
    with Publisher(url, retries=0) as publisher:
        publisher.publish_many(events)


def publishes_from_asyncio(url: str, events: list[Event]) -> None:
    async def publish() -> None:
        async with AsyncPublisher(url, retries=0) as publisher:
            await publisher.publish_many(events)

    asyncio.run(publish())


def adds_to_the_stream(url: str, events: list[Event]) -> None:
    with connect(load_settings(StreamSettings)) as client:
        EventStream(client, STREAM).add([event.to_json() for event in events])


def reaches_celerys_broker(url: str, events: list[Event]) -> None:
    """Celery's own connection; it does in kombu's words what the others do."""
    with make_app(load_settings()).connection_for_write() as connection, connection.channel() as channel:
        for event in events:
            channel.client.xadd(STREAM, {"event": event.to_json()})


Client = Callable[[str, list[Event]], None]
each_client = pytest.mark.parametrize(
    "client", [publishes, publishes_from_asyncio, adds_to_the_stream, reaches_celerys_broker]
)


@pytest.fixture(scope="module")
def trusted(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority(tmp_path_factory.mktemp("trusted"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority(tmp_path_factory.mktemp("stranger"))


@pytest.fixture
def events(user: uuid.UUID, rng: random.Random) -> list[dict[str, Any]]:
    return crowd(user, rng, events=10)


def parsed(events: list[dict[str, Any]]) -> list[Event]:
    return [parse_event(each) for each in encoded(events)]


def redis_port(stack: Stack) -> int:
    return int(urlsplit(stack.environment["REDIS_URL"]).port or 0)


@pytest.fixture
def register(workers: Workers) -> Iterator[Callable[[str, str], None]]:
    """Makes a user of the stack's Redis, who is gone after the test."""
    made: list[str] = []

    def user_with(name: str, password: str) -> None:
        workers.client.acl_setuser(
            name, enabled=True, passwords=[f"+{password}"], keys=["*"], channels=["*"], commands=["+@all"]
        )
        made.append(name)

    yield user_with
    workers.client.acl_deluser(*made)


@dataclass(frozen=True)
class Tls:
    """How TLS may be offered: with a certificate that a client should trust, and such as it should not."""

    stack: Stack
    trusted: Authority
    stranger: Authority

    def proxy(self, *, by: Authority | None = None, host: x509.GeneralName | None = None) -> TlsProxy:
        certificate = (by or self.trusted).issue(host or x509.IPAddress(IPv4Address("127.0.0.1")))
        return TlsProxy(certificate, redis_port(self.stack))

    def url(self, port: int, *, trusting: Authority | None) -> str:
        """With an authority of the client's own, or with those of its system."""
        options = f"?ssl_ca_certs={trusting.file}" if trusting else ""
        return f"rediss://{USER}:{quote(PASSWORD, safe='')}@127.0.0.1:{port}/1{options}"


@pytest.fixture
def tls(stack: Stack, trusted: Authority, stranger: Authority, register: Callable[[str, str], None]) -> Tls:
    register(USER, PASSWORD)
    return Tls(stack, trusted, stranger)


# ----------------------------------------------------------------------------------------------------------- TLS


@each_client
@pytest.mark.parametrize("by", ["its URL", "its system"])
def test_a_certificate_that_is_trusted_lets_a_client_through(
    client: Client, by: str, tls: Tls, workers: Workers, events: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with tls.proxy() as proxy:
        if by == "its system":
            monkeypatch.setenv("SSL_CERT_FILE", str(tls.trusted.file))  # where OpenSSL finds the system's authorities
        url = tls.url(proxy.port, trusting=tls.trusted if by == "its URL" else None)
        monkeypatch.setenv("REDIS_URL", url)
        client(url, parsed(events))
        assert proxy.trusted_by > 0
    assert workers.stream.state().length == len(events)


def says_nothing_secret(text: str) -> bool:
    return not any(spelling in text for spelling in SPELLINGS)


@each_client
@pytest.mark.parametrize("by", ["its URL", "its system"])
@pytest.mark.parametrize("fault", ["of another authority", "for another host"])
def test_a_certificate_that_cannot_be_trusted_is_refused_and_the_error_does_not_tell_the_password(
    client: Client, by: str, fault: str, tls: Tls, workers: Workers, events: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    issuer = tls.stranger if fault == "of another authority" else tls.trusted
    host = x509.DNSName("redis.example") if fault == "for another host" else None
    with tls.proxy(by=issuer, host=host) as proxy:
        if by == "its system":
            monkeypatch.setenv("SSL_CERT_FILE", str(tls.trusted.file))
        url = tls.url(proxy.port, trusting=tls.trusted if by == "its URL" else None)
        monkeypatch.setenv("REDIS_URL", url)
        with pytest.raises(REFUSED) as refused:
            client(url, parsed(events[:1]))
        assert proxy.trusted_by == 0
    told = "".join(traceback.format_exception(refused.value))
    assert "CERTIFICATE_VERIFY_FAILED" in told
    assert says_nothing_secret(told)
    assert workers.stream.state().length == 0


@each_client
def test_no_client_falls_back_to_plain_text(
    client: Client, tls: Tls, events: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = []

    class WithoutTls(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            heard.append(self.request.recv(65536))
            self.wfile.write(b"-ERR unknown command\r\n")

    with socketserver.TCPServer(("127.0.0.1", 0), WithoutTls) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            url = tls.url(server.server_address[1], trusting=tls.trusted)
            monkeypatch.setenv("REDIS_URL", url)
            with pytest.raises(REFUSED) as refused:
                client(url, parsed(events[:1]))
        finally:
            server.shutdown()
            thread.join()
    assert heard != []
    assert all(each[:1] == TLS_HANDSHAKE for each in heard)
    assert says_nothing_secret("".join(traceback.format_exception(refused.value)))


def test_a_worker_applies_events_over_tls(
    tls: Tls, workers: Workers, database: Database, user: uuid.UUID, rng: random.Random, tmp_path: Path
) -> None:
    events = crowd(user, rng, events=100)
    with tls.proxy() as proxy:
        url = tls.url(proxy.port, trusting=tls.trusted)
        with workers.running(REDIS_URL=url) as worker:
            publishes(url, parsed(events[:50]))
            publishes_from_asyncio(url, parsed(events[50:]))
            workers.wait_until_empty()
            assert workers.stop(worker) == 0
    assert_rows_equal_their_stories(database, events)
    assert says_nothing_secret("".join(log.read_text() for log in tmp_path.glob("*.log")))


def test_a_worker_claims_nothing_over_tls_that_it_cannot_trust(
    tls: Tls, workers: Workers, events: list[dict[str, Any]], tmp_path: Path
) -> None:
    workers.stream.add(encoded(events))
    with tls.proxy(by=tls.stranger) as proxy:
        with workers.running(REDIS_URL=tls.url(proxy.port, trusting=tls.trusted)):
            wait_until(lambda: workers.logged("dispatcher.redis_away") != [], "the dispatcher is refused")
            wait_until(lambda: "Cannot connect to" in logs(tmp_path), "Celery is refused")
        assert proxy.trusted_by == 0
    assert logs(tmp_path).count("CERTIFICATE_VERIFY_FAILED") >= 2
    assert says_nothing_secret(logs(tmp_path))
    assert workers.stream.state().pending == 0


def logs(folder: Path) -> str:
    return "".join(log.read_text() for log in folder.glob("*.log"))


# ----------------------------------------------------------------------------------------------------- passwords

each_password = pytest.mark.parametrize(
    "password", ["p@ss", "a/b:c?d#e[f]", "100%25 sure", "+ &=;", "ü€", "\"'\\", PASSWORD], ids=ascii
)


def with_login(url: str, name: str, password: str) -> str:
    return url.replace(urlsplit(url).netloc.rpartition("@")[0], f"{quote(name, safe='')}:{quote(password, safe='')}")


@each_client
@each_password
def test_a_password_may_hold_any_character(
    client: Client,
    password: str,
    workers: Workers,
    register: Callable[[str, str], None],
    events: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    register("us:er@x", password)
    url = with_login(workers.environment["REDIS_URL"], "us:er@x", password)
    monkeypatch.setenv("REDIS_URL", url)
    client(url, parsed(events))
    assert workers.stream.state().length == len(events)
