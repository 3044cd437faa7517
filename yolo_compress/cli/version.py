"""`yolo-compress version`."""

from __future__ import annotations

from yolo_compress import __version__
from yolo_compress.cli.grammar import Command
from yolo_compress.progress import result


def handle(command: Command) -> int:
    """Print the version."""
    result(__version__)
    return 0
