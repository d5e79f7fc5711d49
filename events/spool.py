"""A spool: events that Redis did not confirm wait in a file until a thread has brought them to the stream.

Spool      the file, SQLite: a bounded queue, first in first out, shared by threads and processes
Drainer    the thread: runs only while events wait, sends the oldest first, deletes what Redis has confirmed

SQLite's rules that this module lives by: no connection is open while the process forks, no file descriptor of ours
is ever opened on the database (https://sqlite.org/howtocorrupt.html, 2.2 and 2.6), and the file is on a local disk.
"""

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from typing import Final
from weakref import WeakSet

from redis.backoff import FullJitterBackoff

from events.errors import SpoolError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MAX_BYTES: Final = 256 * 1024**2  # of the file by default: about 500,000 events
MIN_BYTES: Final = 1024**2  # room for a few events of the greatest size
BATCH_EVENTS: Final = 500  # sent in one round trip to Redis
BATCH_BYTES: Final = 4 * 1024**2
BUSY_SECONDS: Final = 5.0  # longest wait for another process that writes
LOOK_SECONDS: Final = 1.0  # how often a publisher looks for events that another process left
BACKOFF: Final = FullJitterBackoff(cap=1.0, base=0.05)  # seconds between two tries to drain
APPLICATION_ID: Final = 0x69767370  # "ivsp", in the file's header

Row = tuple[int, str, bytes]  # id, stream, event
Send = Callable[[Sequence[tuple[str, bytes]]], Sequence[object]]
"""Sends (stream, event) pairs in order; answers one object for each, an Exception where Redis refused it."""

log = logging.getLogger("events.spool")


@contextmanager
def _told_as_spool_error(path: str, max_bytes: int) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
            raise SpoolError(f"the spool {path} is full ({max_bytes} bytes at most), or its disk is") from error
        raise SpoolError(f"the spool {path} cannot be used: {error}") from error


class Spool:
    """Events in the order in which they were appended; every method may be called by any thread or process.

    The file grows to `max_bytes` (its write-ahead log, some 4 MiB, not counted), holds each event with the name of its
    stream, is readable for its user only, and is given back to the disk when the last event has left. Every method
    raises SpoolError; the constructor does for a file that is corrupt, unwritable or something else's.
    """

    def __init__(self, path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> None:
        if max_bytes < MIN_BYTES:
            raise ValueError(f"spool_max_bytes must be {MIN_BYTES} at least")
        self.path = os.path.abspath(path)
        self.max_bytes = max_bytes
        self.lock = threading.RLock()  # guards the connection, and is held while the process forks
        self._connection: sqlite3.Connection | None = None
        self._drain_locks: set[int] = set()  # file descriptors
        _spools.add(self)
        with self._connected() as connection:
            problem = connection.execute("pragma quick_check(1)").fetchone()[0]
            if problem != "ok":
                raise sqlite3.DatabaseError(problem.splitlines()[-1])
            connection.execute("delete from spooled where id is null")  # fails where the file cannot be written

    def append(self, stream: str, events: Sequence[bytes]) -> None:
        """Add all of the events or none; once it returns they are on the disk, whatever happens to the process."""
        with self._connected() as connection, _transaction(connection):
            connection.executemany("insert into spooled (stream, event) values (?, ?)", [(stream, e) for e in events])

    def oldest(self) -> list[Row]:
        """The events that have waited longest, as many as go in one round trip."""
        with self._connected() as connection:
            rows: list[Row] = []
            size = 0
            with closing(connection.execute("select id, stream, event from spooled order by id")) as cursor:
                while len(rows) < BATCH_EVENTS and size < BATCH_BYTES and (row := cursor.fetchone()):
                    rows.append(row)
                    size += len(row[2])
            return rows

    def delete(self, ids: Sequence[int]) -> None:
        """Remove what is in the stream; an id is never used for another event."""
        with self._connected() as connection, _transaction(connection):
            connection.executemany("delete from spooled where id = ?", [(each,) for each in ids])

    def is_empty(self) -> bool:
        """Whether nothing waits."""
        with self._connected() as connection:
            return connection.execute("select 1 from spooled limit 1").fetchone() is None

    def count(self) -> int:
        """How many events wait."""
        with self._connected() as connection:
            return int(connection.execute("select count(*) from spooled").fetchone()[0])

    def shrink(self) -> None:
        """Give the room of deleted events back to the disk, and with it what candidates said."""
        with self._connected() as connection:
            # executescript, because execute takes one step, and one step gives back one page
            connection.executescript("pragma incremental_vacuum; pragma wal_checkpoint(truncate)")

    def close(self) -> None:
        """Close the file; another call opens it again."""
        with self.lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    @contextmanager
    def drain_lock(self, *, wait: bool = False) -> Iterator[bool]:
        """Be the file's only drainer, or be told that another is; the kernel frees the lock when its holder dies."""
        with _told_as_spool_error(self.path, self.max_bytes), self.lock:
            if fcntl is None:
                raise OSError("it needs flock, which this system has not")
            file = os.open(f"{self.path}-lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._drain_locks.add(file)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            with self.lock:
                fcntl.flock(file, fcntl.LOCK_UN)  # closing alone would not do while a fork of ours has it, too
                self._drain_locks.discard(file)
                os.close(file)

    def forget_drain_locks(self) -> None:
        """In a process just forked: give up what its parent holds, so that it is free when the parent dies."""
        for file in self._drain_locks:
            os.close(file)
        self._drain_locks.clear()

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        with _told_as_spool_error(self.path, self.max_bytes), self.lock:
            if self._connection is None:
                self._connection = self._connect()
            yield self._connection

    def _connect(self) -> sqlite3.Connection:
        if not os.path.exists(self.path):
            self._create()
        connection = self._open()
        try:
            if _application_id(connection) != APPLICATION_ID:
                self._lay_out(connection)
            connection.execute("pragma synchronous = full")  # every commit is on the disk, also when power fails
            connection.execute("pragma fullfsync = on")  # on macOS, too
            connection.execute("pragma secure_delete = on")  # what candidates said does not stay in free pages
            page_size = connection.execute("pragma page_size").fetchone()[0]
            connection.execute(f"pragma max_page_count = {self.max_bytes // page_size}")
        except BaseException:
            connection.close()
            raise
        return connection

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)

    def _create(self) -> None:
        """An empty file that only its user may read; SQLite gives its log the same rights."""
        with self.drain_lock(wait=True), suppress(FileExistsError):
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))

    def _lay_out(self, connection: sqlite3.Connection) -> None:
        """Make an empty database a spool, one process after the other."""
        with self.drain_lock(wait=True):
            if _application_id(connection) == APPLICATION_ID:
                return
            if connection.execute("select count(*) from sqlite_master").fetchone()[0]:
                raise sqlite3.DatabaseError("it is the database of something else")
            connection.execute("pragma auto_vacuum = incremental")
            connection.execute("pragma journal_mode = wal").fetchall()
            with _transaction(connection):
                connection.execute(
                    "create table spooled"
                    " (id integer primary key autoincrement, stream text not null, event blob not null)"
                )
                connection.execute(f"pragma application_id = {APPLICATION_ID}")


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("begin immediate")
    try:
        yield
        connection.execute("commit")
    except BaseException:
        if connection.in_transaction:
            connection.execute("rollback")
        raise


def _application_id(connection: sqlite3.Connection) -> int:
    return int(connection.execute("pragma application_id").fetchone()[0])


def _told(error: Exception) -> str:
    """An error in a log line, without the arguments that Redis quotes."""
    return f"{type(error).__name__}: {str(error).partition(', with args')[0]}"


# -------------------------------------------------------------------------------------------------------- forking

_spools: "WeakSet[Spool]" = WeakSet()
_held: list[Spool] = []


def _before_fork() -> None:
    _held[:] = _spools
    for spool in _held:
        spool.lock.acquire()
        with suppress(sqlite3.Error):
            spool.close()


def _after_fork_in_parent() -> None:
    while _held:
        _held.pop().lock.release()


def _after_fork_in_child() -> None:
    for spool in _held:
        spool.lock = threading.RLock()
        spool.forget_drain_locks()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


# ------------------------------------------------------------------------------------------------------- draining


class Drainer:
    """Brings a spool's events to the stream, in a daemon thread that lives while events wait.

    While it is `active`, a publisher appends to the spool and does not try Redis itself: so the order is kept, and
    an outage costs its timeouts once. One drainer of all processes is at work on a file at any moment.
    """

    def __init__(self, spool: Spool, send: Send) -> None:
        self.spool = spool
        self._send = send
        self._thread: threading.Thread | None = None
        self._nudge = threading.Event()
        self._closing = False
        self._sent: list[int] = []  # in the stream, and not yet deleted because the disk was full or the file busy
        self.problem: Exception | None = None  # why the last try to drain failed
        self._process = os.getpid()
        self._looked = time.monotonic()
        self.look()

    @property
    def active(self) -> bool:
        """Whether events wait, or did a moment ago."""
        thread = self._thread
        return thread is not None and thread.is_alive()

    @property
    def must_look(self) -> bool:
        """Whether another process may have left events since we looked, or we are a fork of who looked."""
        return time.monotonic() - self._looked > LOOK_SECONDS or self._process != os.getpid()

    def look(self) -> bool:
        """Start the thread where events wait, whoever left them; answer whether it is active. Raises SpoolError."""
        self._process, self._looked = os.getpid(), time.monotonic()
        if not self.spool.is_empty():
            self._wake()
        return self.active

    def append(self, stream: str, events: Sequence[bytes]) -> None:
        """Spool the events and see that they are drained. Raises SpoolError, and then has spooled none."""
        self.spool.append(stream, events)
        self._wake()

    def flush(self, seconds: float) -> int:
        """Try at once, wait so long at most until nothing waits; answer how many events still do. Raises SpoolError."""
        self.look()
        if (thread := self._thread) is not None:
            self._nudge.set()
            thread.join(seconds)
        return self.spool.count()

    def close(self, seconds: float) -> None:
        """Flush, end the thread and close the file; what still waits is drained by whoever opens the file next."""
        try:
            left = self.flush(seconds)
            if left:
                log.warning("spool.left events=%d path=%s", left, self.spool.path)
        finally:
            self._closing = True
            self._nudge.set()
            if (thread := self._thread) is not None:
                thread.join(seconds)
            self.spool.close()

    def _wake(self) -> None:
        with self.spool.lock:
            if self.active:
                return
            self._closing, self._nudge = False, threading.Event()
            self._thread = threading.Thread(target=self._run, name="interview-spool", daemon=True)
            try:
                self._thread.start()
            except RuntimeError as error:  # no more threads, or the interpreter is ending: the file keeps the events
                self._thread = None
                log.warning("spool.no_thread reason=%s", error)

    def _run(self) -> None:
        failures, self.problem = 0, None
        while not self._ended():
            try:
                if self._drain():
                    failures, self.problem = 0, None
                else:
                    failures += 1
            except Exception as error:  # noqa: BLE001 - a thread that died would keep the events until the next start
                failures += 1
                if type(error) is not type(self.problem):  # once, not at every try
                    log.warning("spool.waits path=%s reason=%s", self.spool.path, _told(error))
                self.problem = error
            if failures:
                self._nudge.wait(BACKOFF.compute(failures))
                self._nudge.clear()

    def _ended(self) -> bool:
        """Whether the thread may go: decided under the lock that `_wake` takes, so that no event is left alone."""
        with self.spool.lock:
            try:
                ended = self._closing or self.spool.is_empty()
            except SpoolError:
                return False
            if ended:
                self._thread = None
        return ended

    def _drain(self) -> bool:
        """Send and delete until nothing waits; False where another process does so. Raises what `send` raises."""
        with self.spool.drain_lock() as mine:
            if not mine:
                return False
            self._delete_sent()
            drained = 0
            while not self._closing and (rows := self.spool.oldest()):
                answers = self._send([(stream, event) for _, stream, event in rows])
                refused = [answer for answer in answers if isinstance(answer, Exception)]
                confirmed = [not isinstance(answer, Exception) for answer in answers]
                self._sent = [row[0] for row, sent in zip(rows, confirmed, strict=True) if sent]
                self._delete_sent()
                drained += len(rows) - len(refused)
                if refused:
                    raise refused[0]
            if drained:
                self.spool.shrink()
                log.info("spool.drained events=%d path=%s", drained, self.spool.path)
        return True

    def _delete_sent(self) -> None:
        if self._sent:
            self.spool.delete(self._sent)
            self._sent = []
