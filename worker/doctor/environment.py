"""The settings: are they all right, and what can be checked with those that are?"""

import difflib
import os
import re
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from pydantic import ValidationError

from worker.doctor.finding import Finding
from worker.errors import SettingsError
from worker.settings import Settings, StreamSettings, load_settings

# What has no default.
EXPORTS: Final = {
    "REDIS_URL": "export REDIS_URL=redis://:PASSWORD@HOST:6379/0",
    "SUPABASE_URL": "export SUPABASE_URL=https://PROJECT.supabase.co",
    "SUPABASE_SECRET_KEY": "export SUPABASE_SECRET_KEY=sb_secret_KEY",
}
WHERE_THE_KEY_IS: Final = "# the secret key: Supabase, Project Settings, API keys"
S = TypeVar("S", bound=StreamSettings)

_VARIABLE: Final = re.compile(r"\b(?:INTERVIEW|REDIS|SUPABASE)_[A-Z_]+\b")
_OPTIONAL: Final[dict[str, Any]] = {
    name: field.default
    for name, field in Settings.model_fields.items()
    if field.validation_alias is None and name != "stream"
}
_KNOWN: Final = [f"INTERVIEW_{name.upper()}" for name in (*_OPTIONAL, "stream")]


@dataclass(frozen=True)
class Environment:
    """What was found, and the settings with which Redis and Supabase can be checked all the same."""

    findings: list[Finding]
    for_redis: StreamSettings | None
    for_supabase: Settings | None


def read_environment() -> Environment:
    """Read the settings; where some are wrong, put the defaults in their place as far as there are any."""
    try:
        settings = load_settings()
    except SettingsError as wrong:
        told = str(wrong)
    else:
        finding = Finding("settings", "ok", f"all can be read; the stream is {settings.stream}")
        return Environment([finding, *_mistyped()], settings, settings)
    both = _or_none(Settings, **_OPTIONAL)
    return Environment(
        [Finding("settings", "failed", told, _remedy(told)), *_mistyped()],
        for_redis=both or _or_none(StreamSettings),
        for_supabase=both or _or_none(Settings, **_OPTIONAL, REDIS_URL="redis://"),
    )


def _or_none(kind: type[S], **instead: Any) -> S | None:
    try:
        return kind(**instead)
    except ValidationError:
        return None


def _remedy(told: str) -> str:
    names = list(dict.fromkeys(_VARIABLE.findall(told)))
    lines = [WHERE_THE_KEY_IS] if "SUPABASE_SECRET_KEY" in names else []
    lines += [EXPORTS[name] for name in names if name in EXPORTS]
    optional = [name for name in names if name not in EXPORTS]
    if optional:
        lines += ["# back to the defaults; or set what the message asks for:", f"unset {' '.join(optional)}"]
    return "\n".join(lines)


def _mistyped() -> list[Finding]:
    """Variables that are almost the name of a setting, and that nobody reads."""
    findings = []
    for name in sorted(os.environ):
        if name.startswith("INTERVIEW_") and name.isidentifier() and name not in _KNOWN:
            for meant in difflib.get_close_matches(name, _KNOWN, n=1, cutoff=0.85):
                remedy = f'export {meant}="${name}"\nunset {name}'
                findings.append(Finding("settings", "failed", f"{name} is no setting, but {meant} is", remedy))
    return findings
