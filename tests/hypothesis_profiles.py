"""How far the tests of universal promises look: HYPOTHESIS_PROFILE=long looks ten times as far, and further."""

import os
from typing import Final

from hypothesis import HealthCheck, settings

# Each example makes its own users, sessions and ids, so that one connection may serve all.
settings.register_profile(
    "short",
    max_examples=200,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.register_profile("long", settings.get_profile("short"), max_examples=2_000)

NAME: Final = os.environ.get("HYPOTHESIS_PROFILE", "short")
PROFILE: Final = settings.get_profile(NAME)
ROUNDS: Final = {"short": 100, "long": 1_000}[NAME]  # of each race
PACKS: Final = {"short": 400, "long": 20_000}[NAME]  # that many workers apply at the same time
