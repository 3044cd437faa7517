"""`yolo-compress bundle`: everything that a robot needs, as a folder or .tar."""

from __future__ import annotations

import json

from yolo_compress.bundle import make
from yolo_compress.cli.grammar import Command
from yolo_compress.progress import result


def handle(command: Command) -> int:
    """Write the bundle, and print the commands to run on the robot."""
    summary = make.make(command.load(), make.order(command.options), wait=command.wait)
    result(f"on the robot, in {command.options['out']}: python3 build.py, python3 bench.py, python3 detect.py SOURCE")
    result(json.dumps(summary))
    return 0
