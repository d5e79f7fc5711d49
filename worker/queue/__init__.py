"""The only place that touches internals of Celery, kombu and billiard; tests/test_queue_internals.py watches them."""
