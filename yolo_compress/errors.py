"""Every failure a user can cause or mend, as one family; anything else is a bug: exit code 70, with a traceback.

A message says what failed, where (file, key, layer), the value got against the one expected, and what to do next.
The exit codes are part of the interface: `make` and schedulers branch on them.
"""


class CompressError(Exception):
    """Base of the family; printed as one line, without traceback."""

    exit_code = 2


class GateFailed(CompressError):
    """The result is complete and written, but a gate (retention, latency, ...) says no."""

    exit_code = 1


class RecipeError(CompressError):
    """A recipe, a command line or a combination of stages that cannot work."""

    exit_code = 2


class DataError(CompressError):
    """Images or labels that would make a number untrue."""

    exit_code = 3


class EnvironmentLacks(CompressError):
    """A package, device, driver or file that this machine does not have."""

    exit_code = 4


class LostRank(EnvironmentLacks):
    """Another process of a distributed run ended, which that process, or whoever started it, explains."""


class CorruptArtifact(CompressError):
    """A checkpoint, engine or artefact whose bytes are not what was vouched for, or cannot be trusted."""

    exit_code = 5


class StorageError(CompressError):
    """The disk or the file system said no (full, read-only, gone)."""

    exit_code = 6


class NumericsError(CompressError):
    """NaN, infinity or a collapsed network."""

    exit_code = 7


class Locked(CompressError):
    """Another run holds the store and the caller asked not to wait."""

    exit_code = 75


class Terminated(BaseException):
    """SIGTERM, as an exception, so that `finally` runs and the store stays whole."""
