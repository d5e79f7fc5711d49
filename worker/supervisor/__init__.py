"""What the main process of a worker does beside Celery: dispatch, watch, report, and end in time."""
