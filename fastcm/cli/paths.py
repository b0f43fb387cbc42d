"""Paths among the arguments of verbs."""

from pathlib import Path
from typing import Any

import click

from fastcm.io.atomic import check_place

PATH = click.Path(path_type=Path)


class OutputFile(click.Path):
    """A file to write, refused before the work where it cannot be written, not after it."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Raises CheckpointError as ``check_place`` does."""
        path = super().convert(value, param, ctx)
        check_place(path)
        return path
