"""The command line `interviews`. Exit status: 0 done, 1 failed, 2 wrong usage or settings, 3 a person is needed."""

from worker.cli.main import main

__all__ = ["main"]
