"""The SQL that the database needs, in the order in which to run it."""

import re
from hashlib import sha256
from pathlib import Path

VERSION = re.compile(r"(?<= Version )[0-9a-f]{8}(?=\.)")  # in a comment on apply_interview_events

ORDER = ("supabase_table_interview_sessions.sql", "supabase_worker_interview_events.sql")


def sql_folder() -> Path:
    """The folder of the SQL files: inside the installed package, or beside it in a checkout."""
    packaged = Path(__file__).parent / "sql"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "sql"


def sql_files() -> list[Path]:
    """The two files, the sessions' first; each is safe to run again."""
    return [sql_folder() / name for name in ORDER]


def sql_text() -> str:
    """What stands in both."""
    return "".join(file.read_text() for file in sql_files())


def sql_version() -> str:
    """What the files say of themselves, and then the database."""
    found = VERSION.search(sql_text())
    return found[0] if found else ""


def worked_out_version() -> str:
    """What they should say: a digest of all else in them."""
    return sha256(VERSION.sub("", sql_text()).encode()).hexdigest()[:8]
