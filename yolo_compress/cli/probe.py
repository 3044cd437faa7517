"""`yolo-compress probe`: write the model at several widths, so that a robot can time the layers."""

from __future__ import annotations

import json
import shlex

from yolo_compress import pipeline
from yolo_compress.cli.grammar import Command
from yolo_compress.progress import result


def handle(command: Command) -> int:
    """Write the model at several widths into a folder, and print the commands to run next."""
    folder = pipeline.probe(command.load(), command.options["out"])
    measure = f"python3 -m yolo_compress.runtime.measure.layer_times {shlex.quote(str(folder))}"
    result(f"on the robot: {measure} --runtime RUNTIME > table.json")
    result("then here: prune.latency_ms=MS prune.latency_table=table.json")
    result(json.dumps({"probe": str(folder)}))
    return 0
