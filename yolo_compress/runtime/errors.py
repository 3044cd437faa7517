"""What can go wrong on the robot and with an engine; the exit codes are those of the package's own family of errors."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import Iterator


class RuntimeFailure(Exception):
    """Base of the family: what a user can mend; printed as one line, without traceback."""

    exit_code = 5


class RuntimeUnavailable(RuntimeFailure):
    """The engine library, a driver or a device is not here.

    Attributes:
        hint: what to install or do.
    """

    exit_code = 4

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(f"{what}; {hint}")
        self.hint = hint


class CudaError(RuntimeFailure):
    """A call of CUDA that failed: out of memory, a lost device, or something that it does not do."""

    exit_code = 4


class EngineError(RuntimeFailure):
    """An engine that is altered, truncated, built elsewhere, or cannot do what is asked of it."""


class NotFinite(EngineError):
    """A network's output holds NaN or infinity."""

    exit_code = 7


class LatencyError(RuntimeFailure):
    """A measuring process failed; carries its own message and the end of its stderr."""

    exit_code = 4


class SourceError(RuntimeFailure):
    """Pictures or labels that were asked for and are not there, or cannot be used."""

    exit_code = 3


@contextmanager
def naming(path: "str | os.PathLike[str]") -> Iterator[None]:
    """Names the file in the OSError of a write, which by itself does not say where the disk was full."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def printable(text: str) -> str:
    """Text for a terminal: spaces, tabs and line breaks stay, any other character that cannot be seen becomes its escape."""
    if text.isprintable():
        return text
    kept = "\n\t\xa0\u202f\u3000"  # the spaces of French and Japanese names too
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)
