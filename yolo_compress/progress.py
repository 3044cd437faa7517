"""Progress output of the package, on stderr: rich bars on a terminal, plain lines elsewhere.

`YOLO_COMPRESS_PROGRESS=off` turns both off. Stdout is for results (`result`). If the reader closes the output (`| head`),
nothing more is printed, but the run goes on.
"""

import errno
import os
import re
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from yolo_compress import ranks
from yolo_compress.errors import StorageError

if TYPE_CHECKING:
    from rich.progress import Progress

PLAIN_SECONDS = 10.0  # so that the log of a long training stays short
PLAIN_PARTS = 10
PLAIN_LEAST_SECONDS = 1.0  # a short loop writes its last line alone
REFRESH_PER_SECOND = 2  # each refresh takes some milliseconds of CPU: at 2 Hz well under 1 % of a training

# control characters C0 and C1, and changes of the writing direction
_CONTROL = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u202a-\\u202e\\u2066-\\u2069]")

_open_bars: list["_PlainBar"] = []
_live: "Progress | None" = None
_last_line = 0.0  # monotonic time of the last plain line of any bar


def say(text: str) -> None:
    """Write one line to stderr, above the bars if there are any. Write nothing if progress is off."""
    if not _silent():
        notice(text)


def notice(text: str) -> None:
    """Write one line to stderr, even if progress is off. Examples are a reason to wait, and an image that was skipped."""
    text = _printable(text)
    if _live is not None:
        _live.console.print(text, markup=False, highlight=False, soft_wrap=True)
    else:
        _write(sys.stderr, text + "\n")


def result(text: str) -> bool:
    """Write one line of results to stdout.

    Returns:
        False once the reader of a pipe or terminal has closed it, else True.

    Raises:
        StorageError: stdout is a file, and the line cannot be written.
    """
    return _write(sys.stdout, _printable(text) + "\n")


def _printable(text: str) -> str:
    """Return text that is safe to print: control characters, except tabs and newlines, become escapes such as \\x1b."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


@contextmanager
def bar(description: str, total: int, unit: str = "", done: int = 0, least: int = 0) -> Iterator[Callable[..., None]]:
    """Show the progress of a loop. Bars may be nested (epochs outside, batches inside).

    Args:
        description: Name of the work, such as "sparsify".
        total: Steps of the whole loop.
        unit: Name of the steps, such as "epochs".
        done: Steps of an earlier run. The estimate of the time left ignores them.
        least: With fewer steps to do, nothing is shown.

    Yields:
        A function `advance(n=1, **fields)`. It adds n finished steps and shows `fields` beside the bar (`box=1.23 kd=0.5`).
    """
    if _silent() or total - done < least:
        yield lambda n=1, **fields: None
    elif _live is not None or _is_terminal(sys.stderr):
        with _rich_bar(description, total, unit, done) as advance:
            yield advance
    else:
        with _plain_bar(description, total, unit, done) as advance:
            yield advance


def _silent() -> bool:
    return os.environ.get("YOLO_COMPRESS_PROGRESS", "").lower() == "off" or ranks.rank() > 0


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:  # closed
        return False


def _write(stream: TextIO | None, text: str) -> bool:
    """Write and flush text. If the reader has closed the stream, redirect the stream to /dev/null. Python then exits without error.

    Returns:
        False if the reader has closed the stream, else True.

    Raises:
        StorageError: stdout is a file, and its disk is full. A full disk of stderr is no error: the log just ends.
    """
    if stream is None:  # Python started with this descriptor closed
        return False
    try:
        stream.write(text)
        stream.flush()
    except UnicodeEncodeError:
        return _write(stream, text.encode("ascii", "backslashreplace").decode())
    except ValueError:
        if not stream.closed:
            raise
    except OSError as error:
        lost = _is_file(stream) or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        _redirect_to_nowhere(stream)
        if lost and stream is sys.stdout:
            raise StorageError(
                f"cannot write stdout: {os.strerror(error.errno or 0)}; the output is cut short"
            ) from error
        return False
    return not stream.closed


def _is_file(stream: TextIO) -> bool:
    try:
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):
        return False


def _redirect_to_nowhere(stream: TextIO) -> None:
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError, AttributeError):
        return  # not a real file, so nothing is flushed at exit
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _seconds(value: float) -> str:
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _show(fields: dict[str, Any]) -> str:
    return " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in fields.items()
    )


class _PlainBar:
    """Progress as lines for a log.

    The outermost bar writes a line at each tenth of its steps, but at most one a second. Any bar writes a line if there was none for
    ten seconds.
    """

    def __init__(self, description: str, total: int, unit: str, done: int) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.first = self.done = self.shown = done
        self.fields: dict[str, Any] = {}
        self.start = time.monotonic()
        self.nested = bool(_open_bars)

    def advance(self, n: int = 1, **fields: Any) -> None:
        self.done += n
        self.fields.update(fields)
        tenth = not self.nested and 0 < self.total <= (self.done - self.shown) * PLAIN_PARTS
        if time.monotonic() - _last_line >= (PLAIN_LEAST_SECONDS if tenth else PLAIN_SECONDS):
            self.show()

    def show(self) -> None:
        global _last_line
        self.shown, _last_line = self.done, time.monotonic()
        _write(sys.stderr, _printable(self.line(_last_line - self.start)) + "\n")

    def line(self, elapsed: float) -> str:
        names = " / ".join(bar.description for bar in [*(b for b in _open_bars if b is not self), self])
        share = f" ({self.done / self.total:.0%})" if self.total > 0 else ""
        count = f"{self.done}/{self.total} {self.unit}".rstrip()
        text = f"{names}: {count}{share}, {_seconds(elapsed)} elapsed"
        new, left = self.done - self.first, self.total - self.done
        if new > 0 and left > 0:
            text += f", {_seconds(elapsed / new * left)} left"
        return f"{text}  {_show(self.fields)}".rstrip()


@contextmanager
def _plain_bar(description: str, total: int, unit: str, done: int) -> Iterator[Callable[..., None]]:
    global _last_line
    plain = _PlainBar(description, total, unit, done)
    if not plain.nested:
        _last_line = plain.start
    _open_bars.append(plain)
    try:
        yield plain.advance
        if not plain.nested and plain.shown != plain.done:
            plain.show()
    finally:
        _open_bars.remove(plain)


class _Quiet:
    """Stream to stderr that ignores a closed terminal. Otherwise the refresh thread of rich would print a traceback."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.encoding = stream.encoding

    def write(self, text: str) -> int:
        _write(self.stream, text)
        return len(text)

    def flush(self) -> None:
        """Do nothing: `write` flushes."""


@contextmanager
def _rich_bar(description: str, total: int, unit: str, done: int) -> Iterator[Callable[..., None]]:
    global _live
    outermost = _live is None
    live = _live or _new_live()
    _live = live
    fields: dict[str, Any] = {}
    task = live.add_task(description, total=total, completed=done, unit=unit, fields="")

    def advance(n: int = 1, **new: Any) -> None:
        fields.update(new)
        live.update(task, advance=n, fields=_show(fields))

    try:
        if outermost:
            live.start()
        yield advance
    finally:
        if outermost:
            _live = None
            live.stop()
        else:
            live.remove_task(task)


def _new_live() -> "Progress":
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left", markup=False),
        TimeRemainingColumn(),
        TextColumn("{task.fields[fields]}", markup=False),
        console=Console(file=_Quiet(sys.stderr), force_terminal=True),  # type: ignore[arg-type]
        refresh_per_second=REFRESH_PER_SECOND,
        redirect_stdout=False,
    )
