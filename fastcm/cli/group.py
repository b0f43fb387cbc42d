"""The root of all verbs, and how a run of one ends."""

import logging
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import click

from fastcm import __version__
from fastcm.errors import FastcmError

log = logging.getLogger("fastcm")

MAX_MESSAGE = 2000


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="fastcm")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Train and sample few-step image generators."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point: run a verb and end with the documented exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    log.setLevel(logging.INFO)
    try:
        with _unwinding():
            cli.main(arguments, prog_name="fastcm", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        _fail(f"{error.format_message()} (see --help)", 2)
    except (click.Abort, KeyboardInterrupt):
        _fail("stopped at once, without saving; what was saved before is untouched", 1)
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        code = _exit_code(error)
        _fail(f"unexpected {type(error).__name__}: {error}" if code is None else str(error), code or 1)


@contextmanager
def _unwinding() -> Iterator[None]:
    """Have SIGTERM end the block as an exception does, so that unfinished files are removed; the exit code stays 128 + 15."""
    if threading.current_thread() is not threading.main_thread():  # no other may set a handler
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit_code(error: Exception) -> int | None:
    """The exit code of an error raised on purpose, None for any other."""
    if isinstance(error, FastcmError):
        return error.exit_code
    from fastcm.kernels.runtime.fallback import KernelUnavailableError

    return 2 if isinstance(error, KernelUnavailableError) else None


def _fail(message: str, code: int) -> NoReturn:
    # Names in a message may come from a file: no control characters for the terminal, and no end of the screen.
    text = "".join(letter if letter.isprintable() else "?" for letter in " ".join(message.split()))
    click.echo(f"fastcm: error: {text if len(text) <= MAX_MESSAGE else text[:MAX_MESSAGE] + ' ...'}", err=True)
    sys.exit(code)
