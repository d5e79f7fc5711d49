"""The embedded stack: Postgres with our SQL, PostgREST before it, and Redis, on free ports of 127.0.0.1."""

import fcntl
import json
import os
import secrets
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Self, TypedDict

import httpx
import jwt
import psycopg
import redis

from worker.embedded import binaries
from worker.embedded.server import READY_SECONDS, STOP_SECONDS, Server, StackError, free_port, primary_group
from worker.sql_files import sql_files

RUNNING = "running"  # a file that is there while all servers are ready
PORTS = ("postgres", "redis", "postgrest", "postgrest_admin")
JWT_EXPIRY = 4102444800  # 2100-01-01: a key that outlives every demo


class State(TypedDict):
    """What a second start needs to find the first, kept in state.json (mode 600)."""

    ports: dict[str, int]
    postgres_password: str
    redis_password: str
    jwt_secret: str


class Stack:
    """Starts in seconds, keeps its data in one folder, and leaves no process behind.

    Use it as a context manager. A folder is used by one Stack at a time; `Stack.running(folder)` finds the
    settings of the one that runs. `temporary` removes the folder at the end.
    """

    def __init__(self, folder: Path, *, postgres_version: int = 18, temporary: bool = False) -> None:
        self.folder = binaries.reachable_folder(folder)
        self.postgres_version = postgres_version
        self.temporary = temporary
        self._lock: IO[str] | None = None

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    @classmethod
    def running(cls, folder: Path) -> dict[str, str] | None:
        """The settings of the stack that runs in this folder, None where none does."""
        home = binaries.reachable_folder(folder)
        deadline = time.monotonic() + READY_SECONDS
        while home.is_dir() and time.monotonic() < deadline:
            lock = _take_lock(home)
            if lock is not None:
                lock.close()
                return None
            if (home / RUNNING).exists():
                state: State = json.loads((home / "state.json").read_text())
                return _environment(state)
            time.sleep(0.05)  # it is starting, or stopping
        return None

    @property
    def environment(self) -> dict[str, str]:
        """The settings a worker needs to use this stack (see worker.settings), and DATABASE_URL for psql."""
        return _environment(self._state)

    @property
    def database_url(self) -> str:
        """libpq's URL of the database, as its superuser."""
        return self.environment["DATABASE_URL"]

    def token(self, role: str, *, user_id: str | None = None) -> str:
        """A JWT for PostgREST: 'service_role', 'anon', or 'authenticated' with the id of a user."""
        return _token(self._state, role, user_id)

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _take_lock(self.folder)
        if self._lock is None:
            raise StackError(f"a stack is running in {self.folder} already: stop it, or use another --data folder")
        (self.folder / "log").mkdir(exist_ok=True)
        (self.folder / RUNNING).unlink(missing_ok=True)  # of a run that was killed
        self._state = self._load_state()
        while True:
            try:
                self._start_servers()
                break
            except StackError:
                self._stop_servers()
                ports, self._state = self._state["ports"], self._load_state()
                if self._state["ports"] == ports:  # or else somebody took one of them before its server did
                    raise
        (self.folder / RUNNING).touch()

    def _start_servers(self) -> None:
        self.postgres, self.redis, self.postgrest = self._postgres(), self._redis(), self._postgrest()
        self.postgres.start()
        self._apply_sql()
        self.redis.start()
        self.postgrest.start()

    def _stop_servers(self) -> None:
        for name in ("postgrest", "redis", "postgres"):
            server: Server | None = getattr(self, name, None)
            if server is not None:
                server.stop()

    def _stop(self) -> None:
        if self._lock is not None:
            (self.folder / RUNNING).unlink(missing_ok=True)
        self._stop_servers()
        if self._lock is not None:
            if self.temporary:
                shutil.rmtree(self.folder, ignore_errors=True)
            self._lock.close()
            self._lock = None

    def _load_state(self) -> State:
        file = self.folder / "state.json"
        old: State | None = json.loads(file.read_text()) if file.exists() else None
        ports = dict(old["ports"] if old else {})
        for name in PORTS:
            ports[name] = free_port(ports.get(name), but={each for other, each in ports.items() if other != name})
        state = State(
            ports=ports,
            postgres_password=old["postgres_password"] if old else secrets.token_urlsafe(24),
            redis_password=old["redis_password"] if old else secrets.token_urlsafe(24),
            jwt_secret=old["jwt_secret"] if old else secrets.token_urlsafe(48),
        )
        file.touch(mode=0o600)
        file.write_text(json.dumps(state))
        return state

    def _postgres(self) -> Server:
        folder, data = binaries.postgres_bin(self.postgres_version), self.folder / "postgres"
        user = binaries.unprivileged_user()
        if not (data / "PG_VERSION").exists():
            _initdb(folder / "initdb", data, self._state["postgres_password"], user)
        _wait_for_predecessor(data / "postmaster.pid")
        version = (data / "PG_VERSION").read_text().strip()
        if version != str(self.postgres_version):
            raise StackError(f"{data} holds Postgres {version} data, not {self.postgres_version}: use another folder")
        arguments = {
            "listen_addresses": "127.0.0.1",
            "port": str(self._state["ports"]["postgres"]),
            "unix_socket_directories": "",
            "max_wal_size": "4GB",
        }
        return Server(
            name="postgres",
            argv=[str(folder / "postgres"), "-D", str(data), *(f"--{k}={v}" for k, v in arguments.items())],
            log=self.folder / "log" / "postgres.log",
            ready=self._postgres_answers,
            user=user,
            stop_signals=(signal.SIGINT, signal.SIGQUIT, signal.SIGKILL),  # fast, immediate, none
        )

    def _postgres_answers(self) -> bool:
        with psycopg.connect(self.database_url, connect_timeout=2):
            return True

    def _redis(self) -> Server:
        data = self.folder / "redis"
        data.mkdir(exist_ok=True)
        config = self.folder / "redis.conf"
        config.touch(mode=0o600)
        config.write_text(
            f"bind 127.0.0.1\nport {self._state['ports']['redis']}\nrequirepass {self._state['redis_password']}\n"
            f'dir "{data}"\nappendonly yes\nappendfsync everysec\nsave ""\nmaxmemory-policy noeviction\n'
        )
        return Server(
            name="redis",
            argv=[str(binaries.redis_server()), str(config)],
            log=self.folder / "log" / "redis.log",
            ready=lambda: bool(redis.Redis.from_url(self.environment["REDIS_URL"]).ping()),
        )

    def _postgrest(self) -> Server:
        ports = self._state["ports"]
        return Server(
            name="postgrest",
            argv=[str(binaries.postgrest())],
            log=self.folder / "log" / "postgrest.log",
            ready=lambda: httpx.get(f"http://127.0.0.1:{ports['postgrest_admin']}/ready").is_success,
            env={
                "PGRST_DB_URI": _database_url(self._state, user="authenticator"),
                "PGRST_DB_SCHEMAS": "public",
                "PGRST_DB_ANON_ROLE": "anon",
                "PGRST_DB_POOL": "10",
                "PGRST_JWT_SECRET": self._state["jwt_secret"],
                "PGRST_SERVER_HOST": "127.0.0.1",
                "PGRST_SERVER_PORT": str(ports["postgrest"]),
                "PGRST_ADMIN_SERVER_PORT": str(ports["postgrest_admin"]),
                "PGRST_LOG_LEVEL": "error",
            },
        )

    def _apply_sql(self) -> None:
        with psycopg.connect(self.database_url, autocommit=True) as database:
            database.execute((Path(__file__).parent / "supabase_shim.sql").read_bytes())
            database.execute(
                psycopg.sql.SQL("alter role authenticator password {}").format(self._state["postgres_password"])
            )
            for file in sql_files():
                database.execute(file.read_bytes())


def _initdb(initdb: Path, data: Path, password: str, user: str | None) -> None:
    data.mkdir(mode=0o700)
    password_file = data.parent / "initdb-password"
    password_file.touch(mode=0o600)
    password_file.write_text(password)
    if user is not None:
        for path in (data, password_file):
            shutil.chown(path, user, primary_group(user))
        data.parent.chmod(data.parent.stat().st_mode | 0o011)
    try:
        subprocess.run(  # noqa: S603 - our own argument list, no shell
            [initdb, "-D", data, "-U", "postgres", "-E", "UTF8", "--no-locale", "-A", "scram-sha-256",
             f"--pwfile={password_file}"],
            user=user, group=None if user is None else primary_group(user), extra_groups=None if user is None else [],
            cwd="/", check=True, capture_output=True, text=True,
        )  # fmt: skip
    except subprocess.CalledProcessError as failed:
        with suppress(OSError):
            data.rmdir()
        lines = [line for line in failed.stderr.splitlines() if line.strip()] or ["it printed nothing"]
        raise StackError(f"initdb failed: {lines[0]}") from failed
    finally:
        password_file.unlink()


def _wait_for_predecessor(pid_file: Path) -> None:
    """Wait until the Postgres of a run that was killed has shut down: it has been told to."""
    deadline = time.monotonic() + STOP_SECONDS
    while pid_file.exists():
        try:
            pid = int(pid_file.read_text().split()[0])
            os.kill(pid, 0)  # only asks whether it is there
        except (FileNotFoundError, ProcessLookupError):
            return
        except PermissionError:
            pass  # it is, as another user's
        if time.monotonic() > deadline:
            raise StackError(f"process {pid} still uses {pid_file.parent}: end it, or use another folder")
        time.sleep(0.05)


def _take_lock(folder: Path) -> IO[str] | None:
    """The folder's lock, None while another process holds it; the kernel gives it back when we end."""
    lock = (folder / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def _database_url(state: State, user: str = "postgres") -> str:
    return f"postgresql://{user}:{state['postgres_password']}@127.0.0.1:{state['ports']['postgres']}/postgres"


def _token(state: State, role: str, user_id: str | None) -> str:
    claims = {"role": role, "iss": "interviews", "exp": JWT_EXPIRY}
    if user_id is not None:
        claims["sub"] = user_id
    return jwt.encode(claims, state["jwt_secret"], algorithm="HS256")


def _environment(state: State) -> dict[str, str]:
    web = f"http://127.0.0.1:{state['ports']['postgrest']}"
    return {
        "REDIS_URL": f"redis://:{state['redis_password']}@127.0.0.1:{state['ports']['redis']}/0",
        "SUPABASE_URL": web,
        "SUPABASE_REST_URL": web,  # PostgREST by itself serves at /, Supabase's gateway at /rest/v1
        "SUPABASE_SECRET_KEY": _token(state, "service_role", None),
        "DATABASE_URL": _database_url(state),
    }
