"""Report why a command failed: one line on stderr, and the exit code. For a bug, also print the traceback."""

from __future__ import annotations

import select
import sys
import tempfile
import traceback
from pathlib import Path
from typing import TextIO

from yolo_compress import home, ranks
from yolo_compress.errors import CompressError, EnvironmentLacks, LostRank, Terminated
from yolo_compress.files.atomic import free_mib, storage_error
from yolo_compress.progress import notice
from yolo_compress.runtime.errors import DISK, RuntimeFailure
from yolo_compress.store.environment import version

BUG, SIGINT, SIGTERM = 70, 130, 143  # 70 is EX_SOFTWARE of sysexits.h; shells use the others
LOST_RANK = 76  # from a rank to its launcher: it lost the others and has printed nothing


def explain(error: BaseException, continues: bool) -> int:
    """Write to stderr why a command ended, and return its exit code.

    Args:
        error: Error that the verb raised.
        continues: Whether the same command, run again, continues where it stopped.

    Returns:
        The exit code. It is 0 only if the reader of stdout has closed the pipe, as `| head` does.
    """
    if ranks.several() and isinstance(error, KeyboardInterrupt | Terminated | LostRank) and _explained():
        if isinstance(error, KeyboardInterrupt):
            return SIGINT
        return LOST_RANK if isinstance(error, LostRank) else SIGTERM
    if isinstance(error, KeyboardInterrupt | Terminated):
        word, code = ("terminated", SIGTERM) if isinstance(error, Terminated) else ("interrupted", SIGINT)
        notice(f"{word}; the same command continues where it stopped" if continues else word)
        return code
    if isinstance(error, BrokenPipeError) and (_reader_left(sys.stdout) or _reader_left(sys.stderr)):
        return 0
    expected = error if isinstance(error, CompressError | RuntimeFailure) else _machine_error(error)
    if expected is None:
        notice("".join(traceback.format_exception(error)).rstrip())
        notice(
            f"error: this is a bug in yolo-compress {version('yolo-compress')}, not in your input. Please report it where you got "
            "yolo-compress, with the command and the lines above"
        )
        return BUG
    notice(f"error: {f'rank {ranks.rank()}: ' if ranks.rank() else ''}{expected}")
    return expected.exit_code


def _explained() -> bool:
    """Check whether another process reports why this rank ends: its launcher, or the first rank on this machine."""
    return ranks.launched() or ranks.local_rank() > 0


def _machine_error(error: BaseException) -> CompressError | None:
    """Return a `CompressError` if the cause is the machine: disk, files, memory or a package. None for a bug."""
    if isinstance(error, MemoryError):
        return EnvironmentLacks("the memory is used up: close other programs, or use smaller images, batches or files")
    if isinstance(error, ImportError) and error.name and not error.name.startswith("yolo_compress"):
        return EnvironmentLacks(f"{error.name} does not import ({error}); run `make setup`")
    if isinstance(error, OSError) and error.errno is not None:
        if error.filename is not None:
            return storage_error(error, Path(str(error.filename)), "use")
        if error.errno not in DISK:  # also a broken pipe: a child process that died
            return None
    folders = (home.weights(), Path(), Path(tempfile.gettempdir()))
    return storage_error(error, min(folders, key=free_mib))


def _reader_left(stream: TextIO | None) -> bool:
    """Return whether the reader of a pipe or terminal has closed it."""
    try:
        descriptor = stream.fileno() if stream else -1
    except (OSError, ValueError):
        return False
    if descriptor < 0:
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
