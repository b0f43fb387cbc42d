"""Values that options give, that a file knows, or that have to be guessed; every guess is written down."""

from dataclasses import dataclass, field
from typing import TypeVar

from fastcm.convert.options import Options
from fastcm.errors import CheckpointError

Value = TypeVar("Value")
FLAGS = {"num_heads": "--heads", "num_heads_up": "--heads-up", "mid_sigmas": "--mid-sigma", "head_major": "--qkv"}


@dataclass
class Told:
    """The options, and the guesses so far."""

    options: Options
    guesses: list[str] = field(default_factory=list)

    @staticmethod
    def flag(name: str) -> str:
        """The option of the command line that sets a value."""
        return FLAGS.get(name, f"--{name.replace('_', '-')}")

    def get(self, name: str, guess: Value, why: str) -> Value:
        """What the option says, otherwise the guess, which is noted with its reason and the option to change it."""
        value = getattr(self.options, name)
        if value is not None:
            return value
        self.guesses.append(f"{name} {guess}, {why} (else give {self.flag(name)})")
        return guess

    def check(self, name: str, found: object, where: str) -> None:
        """Raise CheckpointError where the option says otherwise than the file."""
        value = getattr(self.options, name)
        if value is not None and value != found:
            raise CheckpointError(f"{name} was given as {value}, but by {where} it is {found}")
