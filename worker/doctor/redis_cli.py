"""How a remedy speaks to Redis."""

import shlex
from urllib.parse import parse_qs, urlsplit

from worker.settings import StreamSettings


def redis_cli(settings: StreamSettings) -> str:
    """redis-cli with the server and database of REDIS_URL, for a shell that has it, without showing the password."""
    url = urlsplit(settings.redis_url.get_secret_value())
    if url.scheme == "unix":
        (database,) = parse_qs(url.query).get("db", ["0"])
        return f"redis-cli -s {shlex.quote(url.path)} -n {database}"
    if url.password and not url.username:  # redis-cli would not take it for the default user's
        return r'redis-cli -u "${REDIS_URL/\/://default:}"'
    return 'redis-cli -u "$REDIS_URL"'
