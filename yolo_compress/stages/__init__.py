"""The stages of a recipe. Each has a module with a function `run(job) -> metrics`. `metrics.py` has the types of the metrics.

A stage knows nothing of the store, of `make` or of the command line.
"""

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
    """Everything that a stage gets when it runs: settings, data, input artefacts and output folders.

    Attributes:
        config: Section of the stage in the recipe. Everything else that the stage reads must be in the fingerprint.
        recipe: The recipe. Stages read `data` and `run` from it. Only `report` uses all of it.
        dataset: Images and labels that passed the preflight.
        inputs: Input artefacts by stage name. If the recipe leaves a stage out, its entry is the artefact of the stand-in stage.
        out: Folder that becomes the artefact.
        work: Scratch folder. It survives a kill, and is deleted when the artefact is published.
    """

    config: Any
    recipe: Recipe
    dataset: Dataset
    inputs: Mapping[str, Artifact]
    out: Path
    work: Path

    @property
    def imgsz_hw(self) -> tuple[int, int]:
        """(height, width) of the model's input, px."""
        return self.recipe.data.imgsz_hw


def load_progress(file: Path, keys: Mapping[str, type]) -> dict[str, Any] | None:
    """Read a JSON file that an earlier, killed run of the stage left in `work`. Return None if the file does not exist.

    Args:
        file: JSON file in `work`.
        keys: Required keys and their types.

    Raises:
        CorruptArtifact: The file is damaged.
    """
    if not file.is_file():
        return None
    hint = f"; delete {file} to measure again"
    content = strict_json.load(file, CorruptArtifact, hint)
    for key, kind in keys.items():
        if not isinstance(content.get(key), kind):
            raise CorruptArtifact(f"{file}: {key} is not of type {kind.__name__}{hint}")
    return content
