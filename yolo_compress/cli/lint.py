"""`yolo-compress lint`: find faults of an ONNX file before an engine is built from the file."""

from __future__ import annotations

import json
from pathlib import Path

from yolo_compress.cli.grammar import Command
from yolo_compress.lint import isolated
from yolo_compress.lint.targets import DEFAULT
from yolo_compress.progress import result


def handle(command: Command) -> int:
    """Print the findings about an ONNX file. Return exit code 1 if a finding is an error."""
    text, document = isolated.check_isolated(Path(command.words[0]), command.options.get("target", DEFAULT))
    result(text)
    result(json.dumps(document))
    return 1 if document["error"] else 0
