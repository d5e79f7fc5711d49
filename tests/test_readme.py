"""The README tells the truth about commands, paths, settings and log lines."""

import re
from pathlib import Path

import click
import pytest

from worker.cli.main import interviews
from worker.settings import Settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def commands(group: click.Group, prefix: str) -> list[str]:
    found = []
    for name, command in group.commands.items():
        path = f"{prefix} {name}"
        found += commands(command, path) if isinstance(command, click.Group) else [path]
    return found


@pytest.mark.parametrize("command", commands(interviews, "interviews"))
def test_every_command_is_in_the_readme(command: str) -> None:
    assert command in README


@pytest.mark.parametrize(
    "command", sorted(set(re.findall(r"(?:^|`)(interviews (?:dlq |session )?[a-z]+)", README, re.MULTILINE)))
)
def test_every_command_in_the_readme_exists(command: str) -> None:
    assert command in [*commands(interviews, "interviews"), "interviews dlq", "interviews session"]


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_every_path_in_the_readme_exists(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make ([a-z][a-z-]+)", README))))
def test_every_make_target_in_the_readme_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_in_the_readme_with_its_default(name: str) -> None:
    field = Settings.model_fields[name]
    alias = field.validation_alias
    variable = alias if isinstance(alias, str) else f"INTERVIEW_{name.upper()}"
    variable = "SUPABASE_SECRET_KEY" if name == "supabase_secret_key" else variable
    (row,) = re.findall(rf"^\| `{variable}` \|(.*?)\|", README, re.MULTILINE)
    if isinstance(field.default, str | int | float):
        shown = f"{field.default:g}" if isinstance(field.default, int | float) else field.default
        assert row.strip().strip("`") == shown


@pytest.mark.parametrize(
    "event",
    sorted(set(re.findall(r"`((?:dispatcher|drain|event|hold|message|pack|suspect|worker)\.[a-z_]+)`", README))),
)
def test_every_log_event_in_the_readme_is_logged(event: str) -> None:
    sources = "".join(path.read_text() for path in (ROOT / "worker").rglob("*.py"))
    assert f'"{event}"' in sources
