"""Which folder of `weights/` leads to a recipe's results: that of its name, unless another file of that name has it.

The folder notes its recipe file in `.recipe`, relative to `weights/`, so that it stays true when the working folder moves.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from yolo_compress.files.atomic import atomic_write, storage_errors
from yolo_compress.recipe.recipe import SHIPPED, Recipe

OWNER = ".recipe"


def label(root: Path, recipe: Recipe) -> str:
    """Name of the folder: the recipe's, or with a hash of the file's place where the folder is of another file, still there.

    So results of one recipe are never shown as those of another.
    """
    if not recipe.source:
        return recipe.name
    place, owner = _place(root, recipe), owner_of(root, recipe.name)
    if owner in (None, place):
        return recipe.name
    own = f"{recipe.name}~{hashlib.sha256(place.encode()).hexdigest()[:6]}"
    moved = owner != SHIPPED and not os.path.exists(root / str(owner))
    return recipe.name if moved and not (root / own).is_dir() else own


def owner_of(root: Path, name: str) -> str | None:
    """The recipe file, relative to the root, that the folder is of; None where it does not say."""
    try:
        return (root / name / OWNER).read_text(encoding="utf-8", errors="replace").removesuffix("\n")
    except OSError:
        return None


def claim(root: Path, recipe: Recipe) -> None:
    """Note in the recipe's folder that it is the recipe's.

    Raises:
        StorageError: The folder cannot be written.
    """
    folder = root / label(root, recipe)
    if recipe.source and owner_of(root, folder.name) != _place(root, recipe):
        with storage_errors(folder, "write"):
            folder.mkdir(parents=True, exist_ok=True)
            atomic_write(folder / OWNER, _place(root, recipe) + "\n")


def _place(root: Path, recipe: Recipe) -> str:
    return SHIPPED if recipe.source == SHIPPED else os.path.relpath(recipe.source, os.path.realpath(root))
