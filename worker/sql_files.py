"""The SQL that the database needs, in the order in which to run it."""

from pathlib import Path

ORDER = ("supabase_table_interview_sessions.sql", "supabase_worker_interview_events.sql")


def sql_folder() -> Path:
    """The folder of the SQL files: inside the installed package, or beside it in a checkout."""
    packaged = Path(__file__).parent / "sql"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "sql"


def sql_files() -> list[Path]:
    """The two files, the sessions' first; each is safe to run again."""
    return [sql_folder() / name for name in ORDER]
