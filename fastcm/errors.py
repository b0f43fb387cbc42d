"""Errors that a user can cause, each with the exit code the command line ends with."""


class FastcmError(Exception):
    """Base of every error raised on purpose; the message says what is wrong and what to do."""

    exit_code = 1


class ConfigError(FastcmError):
    """A configuration key, value or combination that cannot work (exit code 2)."""

    exit_code = 2


class DataError(FastcmError):
    """A data set that is missing, damaged or not what the configuration says (exit code 3)."""

    exit_code = 3


class CheckpointError(FastcmError):
    """A bundle or checkpoint that is missing, damaged or belongs to something else (exit code 3)."""

    exit_code = 3


class Interrupted(FastcmError):
    """The run was stopped from outside after saving; the same command resumes it (exit code 75)."""

    exit_code = 75
