"""`yolo-compress keygen`: write a private key, to sign bundles, and its public key, for robots that check the signatures."""

from __future__ import annotations

import json
from pathlib import Path

from yolo_compress.bundle.keys import keygen
from yolo_compress.cli.grammar import Command
from yolo_compress.progress import result


def handle(command: Command) -> int:
    """Write the private and the public key, and print where to store each."""
    made = keygen(Path(command.options["out"]))
    result(f"on the robot: install {made['public_key']} as {made['pin_as']}; keep {made['key']} off every robot")
    result(json.dumps(made))
    return 0
