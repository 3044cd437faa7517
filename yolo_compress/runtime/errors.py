"""Errors of engines and of the commands on the robot. Their exit codes have the same meaning as in `yolo_compress.errors`."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from typing import Iterator

# A disk that is full, over quota, failing or read-only, or a file above the limit of its size.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


class RuntimeFailure(Exception):
    """Base class of errors that a user can fix. They are printed as one line, without traceback."""

    exit_code = 5


class RuntimeUnavailable(RuntimeFailure):
    """The engine library, a driver or a device is missing.

    Attributes:
        hint: what to install or do.
    """

    exit_code = 4

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(f"{what}; {hint}")
        self.hint = hint


class CudaError(RuntimeFailure):
    """A CUDA call failed: out of memory, a lost device, or an unsupported operation."""

    exit_code = 4


class EngineError(RuntimeFailure):
    """An engine is altered, truncated or built for another machine. Or it does not support what the caller asks for."""


class NotConverted(EngineError):
    """The converter of a runtime cannot write this model: an unknown layer, or a number that its format cannot hold."""


class NotFinite(EngineError):
    """A model's output holds NaN or infinity."""

    exit_code = 7


class LatencyError(RuntimeFailure):
    """A measuring process failed. The message has the end of its stderr."""

    exit_code = 4


class SourceError(RuntimeFailure):
    """Images or labels are missing or cannot be used."""

    exit_code = 3


@contextmanager
def naming(path: "str | os.PathLike[str]") -> Iterator[None]:
    """Add the file name to an OSError that is raised in the `with` block. The error of a failed write has no file name."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def printable(text: str) -> str:
    """Escape the invisible characters of a text for the terminal, except spaces, tabs and line breaks."""
    if text.isprintable():
        return text
    allowed = "\n\t\xa0\u202f\u3000"  # includes the spaces in French and Japanese names
    return "".join(c if c.isprintable() or c in allowed else c.encode("unicode_escape").decode() for c in text)
