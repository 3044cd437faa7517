"""One file a stage: `run(job) -> metrics`, typed in `metrics.py`. A stage knows nothing of caching, make or the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yolo_compress.data.dataset import Dataset
from yolo_compress.errors import CorruptArtifact
from yolo_compress.files import strict_json
from yolo_compress.recipe.recipe import Recipe
from yolo_compress.store.manifest import Artifact


@dataclass(frozen=True)
class Job:
    """What a stage is given.

    Attributes:
        config: The stage's own section of the recipe; what it reads of anything else must be in the fingerprint.
        recipe: The whole recipe, for `data.imgsz`, `run` and, in `report` alone, to print it.
        dataset: Images and labels that passed the preflight.
        inputs: Upstream artefacts by stage name; a stage that the recipe leaves out is replaced by what it stands for.
        out: The folder that becomes the artefact.
        work: Scratch folder: kept when the stage is killed, dropped when it is published.
    """

    config: Any
    recipe: Recipe
    dataset: Dataset
    inputs: Mapping[str, Artifact]
    out: Path
    work: Path

    @property
    def imgsz_hw(self) -> tuple[int, int]:
        """(height, width) in pixels of the network's input."""
        return self.recipe.data.imgsz_hw


def resumed(file: Path, keys: Mapping[str, type]) -> dict[str, Any] | None:
    """What an earlier, killed run of the stage kept in its `work`; None where it kept nothing yet.

    Args:
        keys: Entries that it must have, and their types.

    Raises:
        CorruptArtifact: The file is damaged.
    """
    if not file.is_file():
        return None
    hint = f"; delete {file} to measure again"
    found = strict_json.load(file, CorruptArtifact, hint)
    for key, kind in keys.items():
        if not isinstance(found.get(key), kind):
            raise CorruptArtifact(f"{file}: {key} is no {kind.__name__}{hint}")
    return found
