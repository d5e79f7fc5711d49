"""An engine in a process of its own: publishes interviews without pause, and keeps what Redis did not confirm.

    python -m tests.chaos.engine URL USER_ID SEED RATE [SPOOL]

Prints every session's seed on a line of its own once all its events are confirmed, or in the spool where there is one;
ends at SIGTERM, after the session that it is at, when the spool is empty.
"""

import random
import signal
import sys
import time
import uuid

from events import Event, Publisher, PublishError, parse_event
from tests.stories import encoded, interview


def session_events(user: uuid.UUID, seed: int) -> list[dict[str, object]]:
    """The events of the session with this seed: the checker makes the same ones."""
    return interview(user, random.Random(seed))


def main(url: str, user_id: str, seed: int, rate: float, spool: str | None = None) -> None:
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    user, rng = uuid.UUID(user_id), random.Random(seed)
    with Publisher(url, timeout=1.0, retries=2, spool=spool) as publisher:
        while not stop:
            session = rng.getrandbits(64)
            events = [parse_event(raw) for raw in encoded(session_events(user, session))]
            rng.shuffle(events)
            publish_for_certain(publisher, events, rng)
            print(session, flush=True)
            time.sleep(len(events) / rate)
        while publisher.flush():
            pass


def publish_for_certain(publisher: Publisher, events: list[Event], rng: random.Random) -> None:
    """Publish until confirmed; some one by one, some together, one of ten sessions twice."""
    again = events if rng.random() < 0.1 else []
    chunks = [[event] for event in events] if rng.random() < 0.2 else [[*events, *again]]
    while chunks:
        try:
            publisher.publish_many(chunks[0])
            del chunks[0]
        except PublishError:
            time.sleep(0.1)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), *sys.argv[5:])
