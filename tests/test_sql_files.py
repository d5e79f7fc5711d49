"""The version that the SQL says of itself."""

from worker.sql_files import sql_version, worked_out_version


def test_the_sql_says_which_version_it_is() -> None:
    assert sql_version() == worked_out_version(), "write the latter in the comment on apply_interview_events"
