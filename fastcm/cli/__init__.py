"""The command line: thin verbs, each of which calls one function.

Exit codes: 0 done, 2 usage or configuration, 3 data or checkpoint, 75 interrupted and saved, 1 a crash.
"""

from fastcm.cli import bench, runs, samples, weights  # noqa: F401  importing them adds their verbs
from fastcm.cli.group import cli, main

__all__ = ["cli", "main"]
