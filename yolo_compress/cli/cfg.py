"""`yolo-compress cfg`: the whole recipe as YAML, with defaults and overrides."""

from __future__ import annotations

from yolo_compress.cli.grammar import Command
from yolo_compress.progress import result


def handle(command: Command) -> int:
    """Print the whole recipe as YAML, with defaults and the overrides of the command line."""
    result(command.load().dump().rstrip("\n"))
    return 0
