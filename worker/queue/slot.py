"""Which slot of the pool a process is."""

from celery.utils.log import current_process_index


def slot_of_process() -> int | None:
    """The number of this process in a prefork pool, from 0; None in any other process.

    Celery uses it for `%i` in the name of a log file, and says there that a process started in the stead of one that
    ended has its number: https://docs.celeryq.dev/en/stable/userguide/workers.html#prefork-pool-process-index
    """
    index: int | None = current_process_index(base=0)
    return index
