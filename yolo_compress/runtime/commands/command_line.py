"""The command line of the bundle's commands: options, one-line errors, exit codes, and lines of output."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any, Callable, Optional, TextIO

from ..errors import RuntimeFailure, printable

STORAGE, INTERRUPTED = 6, 130  # exit codes


def positive(text: str) -> int:
    """Parse the value of an option: a whole number of 1 or more."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def seconds(text: str) -> float:
    """Parse the value of an option: a finite number of seconds above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value


class Parser(argparse.ArgumentParser):
    """Parser of a command's options. If the help cannot be printed, the command fails. Plain argparse would exit with code 0."""

    def print_help(self, file: Any = None) -> None:
        code = run_command(lambda: answer(self.format_help().rstrip("\n")))
        if code:
            sys.exit(code)


def run_command(action: Callable[[], Optional[int]]) -> int:
    """Run a command and return its exit code. An error is printed on stderr as one line, and decides the exit code."""
    try:
        return action() or 0
    except RuntimeFailure as error:
        say(f"error: {error}")
        return error.exit_code
    except BrokenPipeError:  # the reader of stdout has closed it, as `| head` does
        return 0
    except OSError as error:
        say(f"error: {error.filename2 or error.filename or 'file system'}: {error.strerror or error}")
        return STORAGE
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED


def answer(text: str) -> None:
    """Write a line to stdout and flush it.

    Raises:
        OSError: the line cannot be written, as when the disk is full. BrokenPipeError: the reader has closed the pipe.
    """
    _print(text, sys.stdout)


def say(text: str) -> None:
    """Write a line to stderr. stdout is reserved for results. A failed write is ignored."""
    try:
        _print(text, sys.stderr)
    except OSError:
        pass  # there is nowhere else to report it


def _print(text: str, stream: TextIO) -> None:
    try:
        print(printable(text), file=stream, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # else flushing the buffer at exit fails again
        raise OSError(error.errno, error.strerror, stream.name) from error
