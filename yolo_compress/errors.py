"""Errors that a user can cause or correct, with their exit codes. Any other error is a bug: exit code 70, with a traceback.

A message says what failed, where (file, key, layer), the value, the expected value, and what to do.
The exit codes are part of the interface: `make` and schedulers depend on them.
"""


class CompressError(Exception):
    """Base of all errors that a user can correct. It is printed as one line, without traceback."""

    exit_code = 2


class GateFailed(CompressError):
    """The result is complete and written, but it fails a gate (retention, latency, ...)."""

    exit_code = 1


class RecipeError(CompressError):
    """A recipe or command line is wrong, or its settings cannot work together."""

    exit_code = 2


class DataError(CompressError):
    """Images or labels are wrong. A result from them would be wrong too."""

    exit_code = 3


class EnvironmentLacks(CompressError):
    """This machine does not have a package, device, driver or file."""

    exit_code = 4


class LostRank(EnvironmentLacks):
    """Another process of a distributed run ended. That process, or the launcher that started it, prints the cause."""


class CorruptArtifact(CompressError):
    """A checkpoint, engine or artefact is damaged, was changed, or cannot be trusted."""

    exit_code = 5


class StorageError(CompressError):
    """The disk or file system failed: it is full, read-only or missing."""

    exit_code = 6


class NumericsError(CompressError):
    """A value is NaN or infinite, or a model collapsed."""

    exit_code = 7


class Locked(CompressError):
    """Another run holds the store, and the caller asked not to wait."""

    exit_code = 75


class Terminated(BaseException):
    """This process got SIGTERM. As an exception, it lets `finally` blocks run, so the store stays intact."""
