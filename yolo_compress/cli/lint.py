"""`yolo-compress lint`: faults of an ONNX file, found before an engine is built from it."""

from __future__ import annotations

import json
from pathlib import Path

from yolo_compress.cli.grammar import Command
from yolo_compress.lint import isolated
from yolo_compress.lint.targets import DEFAULT
from yolo_compress.progress import result


def handle(command: Command) -> int:
    """Print the findings; exit code 1 if one of them is an error."""
    text, document = isolated.check_isolated(Path(command.words[0]), command.options.get("target", DEFAULT))
    result(text)
    result(json.dumps(document))
    return 1 if document["error"] else 0
