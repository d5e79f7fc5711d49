"""What a worker of ours does not do as Celery's default would, and Celery has no setting for."""

from typing import Any, Final

from worker.queue.transport import Transport

BRPOP_SECONDS: Final = 10  # longest wait for a message: kombu's second would be 60 commands of Redis a minute
HEARTBEAT_SECONDS: Final = 30


def set_worker_options(worker: Any) -> None:
    """Set them, in a bootstep of the worker, before it consumes.

    Gossip, mingle and heartbeat are options of the command line only (celery/bin/worker.py). Workers need not know each
    other; Flower may know them, at fewer commands of Redis than one every 2 s. `brpop_timeout` is an attribute of
    kombu's transport; only a worker's is long, so that `celery inspect` ends as soon as ever.
    """
    Transport.brpop_timeout = BRPOP_SECONDS
    worker.options.update(without_gossip=True, without_mingle=True)
    worker.options["heartbeat_interval"] = worker.options.get("heartbeat_interval") or HEARTBEAT_SECONDS
