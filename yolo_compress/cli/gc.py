"""`yolo-compress gc`: delete artefacts that no recipe uses. Interrupted stages stay, because they can continue."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from yolo_compress import home, status
from yolo_compress.cli.grammar import Command
from yolo_compress.progress import result
from yolo_compress.store import garbage
from yolo_compress.store.store import Store


def handle(command: Command) -> int:
    """Delete the artefacts that no recipe uses. Print the deleted artefacts, and the interrupted stages that stay.

    An artefact is used if the recipe of the command line needs it, or if a link `<recipe>/<stage>` leads to it.
    """
    store = Store(home.weights())
    recipe = command.load() if command.names_recipe else None
    with store.lock("gc", command.wait):
        removed = garbage.gc(store, status.referred(store, recipe))
        interrupted = garbage.interrupted(store)
    for path in removed:
        result(f"removed {path}")
    for path, size in interrupted.items():
        result(f"kept {path} ({size / 2**20:.1f} MiB): its stage was interrupted and can continue; rm -r deletes it")
    answer = {
        "removed": len(removed),
        "mib": _mib(removed),
        "interrupted": len(interrupted),
        "kept_mib": _mib(interrupted),
    }
    result(json.dumps(answer))
    return 0


def _mib(sizes: Mapping[Path, int]) -> float:
    return round(sum(sizes.values()) / 2**20, 1)
