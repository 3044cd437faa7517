"""`yolo-compress version`: print the version of this package."""

from __future__ import annotations

from yolo_compress import __version__
from yolo_compress.cli.grammar import Command
from yolo_compress.progress import result


def handle(command: Command) -> int:
    """Print the version of this package."""
    result(__version__)
    return 0
