"""`yolo-compress status`: show which stages are up to date, and why the other stages are not."""

from __future__ import annotations

import json

from yolo_compress.cli.grammar import Command
from yolo_compress.progress import result
from yolo_compress.status import status


def handle(command: Command) -> int:
    """Print for each stage whether it is up to date. If it is not, print the reasons below."""
    recipe = command.load()
    rows = list(status(recipe))
    for row in rows:
        result(f"{row.stage:<9} {row.state}" + "".join(f"\n{'':<10}{line}" for line in row.why))
    result(json.dumps({"recipe": recipe.name, "stages": {row.stage: row.state for row in rows}}))
    return 0
