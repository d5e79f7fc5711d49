"""The limit: two bare clients that do nothing but call the batch RPC, with packs made beforehand."""

import multiprocessing
import time
from collections.abc import Sequence
from typing import Any, Final

from worker.database import Database
from worker.settings import load_settings

CLIENTS: Final = 2

Pack = list[dict[str, Any]]


def events_per_second(packs: Sequence[Pack]) -> float:
    """Events per second, from the first call to the last answer; the packs are dealt to the clients in turn."""
    spawned = multiprocessing.get_context("spawn")
    ready = spawned.Barrier(CLIENTS)
    times: Any = spawned.Queue()
    clients = [spawned.Process(target=_client, args=(packs[n::CLIENTS], ready, times)) for n in range(CLIENTS)]
    for client in clients:
        client.start()
    spans = [times.get(timeout=600) for _ in clients]
    for client in clients:
        client.join()
    seconds: float = max(end for _, end in spans) - min(begin for begin, _ in spans)
    return sum(map(len, packs[CLIENTS:])) / seconds


def _client(packs: Sequence[Pack], ready: Any, times: Any) -> None:
    database = Database(load_settings())
    database.apply_events(packs[0])  # connects
    ready.wait(timeout=600)
    began = time.monotonic()
    for pack in packs[1:]:
        database.apply_events(pack)
    times.put((began, time.monotonic()))
    database.close()
