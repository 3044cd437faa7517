"""Choose the folder `weights/NAME` for the links to a recipe's results. Two recipe files with the same name get two folders.

The file `.recipe` in the folder has the path of the recipe file, relative to `weights/`. The path stays valid if the working
folder is moved.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from yolo_compress.files.atomic import atomic_write, storage_errors
from yolo_compress.recipe.recipe import SHIPPED, Recipe

OWNER = ".recipe"


def label(root: Path, recipe: Recipe) -> str:
    """Return the name of the recipe's folder: the name of the recipe, or that name and a hash of the file's path.

    The hash is added if the folder belongs to another recipe file that still exists. So two recipe files never share a folder.
    """
    if not recipe.source:
        return recipe.name
    path, owner = _relative_path(root, recipe), owner_of(root, recipe.name)
    if owner in (None, path):
        return recipe.name
    hashed = f"{recipe.name}~{hashlib.sha256(path.encode()).hexdigest()[:6]}"
    moved = owner != SHIPPED and not os.path.exists(root / str(owner))
    return recipe.name if moved and not (root / hashed).is_dir() else hashed


def owner_of(root: Path, name: str) -> str | None:
    """Return the path, relative to `root`, of the recipe file that owns the folder. None: it has no readable `.recipe`."""
    try:
        return (root / name / OWNER).read_text(encoding="utf-8", errors="replace").removesuffix("\n")
    except OSError:
        return None


def claim(root: Path, recipe: Recipe) -> None:
    """Write the path of the recipe file into the recipe's folder.

    Raises:
        StorageError: The folder cannot be written.
    """
    folder = root / label(root, recipe)
    if recipe.source and owner_of(root, folder.name) != _relative_path(root, recipe):
        with storage_errors(folder, "write"):
            folder.mkdir(parents=True, exist_ok=True)
            atomic_write(folder / OWNER, _relative_path(root, recipe) + "\n")


def _relative_path(root: Path, recipe: Recipe) -> str:
    return SHIPPED if recipe.source == SHIPPED else os.path.relpath(recipe.source, os.path.realpath(root))
