"""Find the checkpoints that a recipe starts from."""

from __future__ import annotations

import os
import re
from pathlib import Path

from yolo_compress import home
from yolo_compress.errors import EnvironmentLacks, RecipeError
from yolo_compress.files.strict_yaml import shown

OFFICIAL = re.compile(r"yolov8[nsmlx]\.pt")  # names that `yolo-compress fetch` can download


def find_weights(name: str) -> Path:
    """Return the path of a checkpoint.

    Places, in this order: the path `name` itself, `home.weights()`, and the folders in `YOLO_COMPRESS_WEIGHTS`
    (colon-separated).

    Raises:
        RecipeError: The path exists but is not a readable file.
        EnvironmentLacks: The checkpoint is in none of the places.
    """
    folders = [home.weights(), *(Path(part) for part in os.environ.get("YOLO_COMPRESS_WEIGHTS", "").split(":") if part)]
    for candidate in [Path(name), *(folder / name for folder in folders)]:
        try:
            if candidate.is_dir():
                raise RecipeError(f"{shown(candidate)}: a folder, expected a checkpoint file")
            if candidate.is_file():
                with candidate.open("rb"):
                    return candidate
            if candidate.is_symlink():
                raise RecipeError(f"{shown(candidate)}: a link to a file that does not exist")
        except OSError as error:
            raise RecipeError(f"{shown(candidate)}: cannot be read ({error.strerror})") from error
    fetch = f", or run `yolo-compress fetch {Path(name).name}` on a machine with a network"
    raise EnvironmentLacks(
        f"{shown(name)}: no such checkpoint here, in {folders[0]}/ or in YOLO_COMPRESS_WEIGHTS; "
        f"put it into {folders[0]}/" + (fetch if OFFICIAL.fullmatch(Path(name).name) else "")
    )
