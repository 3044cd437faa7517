"""The folders for data, weights and artefacts: `datasets/` and `weights/` in the working directory or `YOLO_COMPRESS_HOME`.

Other modules get the two folders from here. Nothing is ever written into the folder of the code.
"""

import os
import re
from pathlib import Path

VARIABLE = "YOLO_COMPRESS_HOME"
# weights/NAME has the links of a recipe, weights/store all artefacts
_RECIPE_NAME = re.compile(r"(?!store\Z)[^\W_][^/\\]*")


def weights() -> Path:
    """Return the folder of checkpoints, the artefact store and its links `<recipe>/<stage>`. It may not exist yet."""
    return _home() / "weights"


def datasets() -> Path:
    """Return the folder of data sets and data yamls. `fetch` writes data sets into it. It may not exist yet."""
    return _home() / "datasets"


def searches() -> Path:
    """Return the folder of the studies of `search`, a folder each. It may not exist yet."""
    return _home() / "searches"


def holds(path: Path) -> bool:
    """Return whether `path` is the folder of weights, data sets or studies, or a path inside these folders."""
    full = path.absolute()
    return any(full.is_relative_to(folder.absolute()) for folder in (weights(), datasets(), searches()))


def is_recipe_name(name: str) -> bool:
    """Return whether `name` is allowed as the name of a recipe.

    A name is printable, starts with a letter or digit, has no / or \\, and is not `store`.
    """
    return name.isprintable() and _RECIPE_NAME.fullmatch(name) is not None


def _home() -> Path:
    return Path(os.environ.get(VARIABLE) or ".").expanduser()
