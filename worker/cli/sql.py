"""`interviews sql`: the SQL to paste in Supabase's SQL editor."""

import click

from worker.sql_files import sql_files


@click.command(epilog="Example: interviews sql > all.sql")
@click.option("--list", "list_files", is_flag=True, help="Print the files' paths instead, in the order to run them.")
def sql(list_files: bool) -> None:
    """Print the SQL that the database needs, in order; safe to run again."""
    for file in sql_files():
        click.echo(file if list_files else file.read_text())
