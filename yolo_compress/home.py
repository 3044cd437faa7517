"""Where data, weights and artefacts lie: `datasets/` and `weights/` of the working directory, or of `YOLO_COMPRESS_HOME`.

No other file names these two folders, and nothing is ever written beside the code.
"""

import os
import re
from pathlib import Path

VARIABLE = "YOLO_COMPRESS_HOME"
_RECIPE_NAME = re.compile(
    r"(?!store\Z)[^\W_][^/\\]*"
)  # weights/NAME holds a recipe's links, weights/store all artefacts


def weights() -> Path:
    """Folder of source checkpoints, of the artefact store and of its links `<recipe>/<stage>`; may not be there yet."""
    return _home() / "weights"


def datasets() -> Path:
    """Folder of data sets and data yamls, where drawn and downloaded sets land; may not be there yet."""
    return _home() / "datasets"


def holds(path: Path) -> bool:
    """Whether `path` lies in one of the two folders, or is one."""
    full = path.absolute()
    return any(full.is_relative_to(folder.absolute()) for folder in (weights(), datasets()))


def is_recipe_name(name: str) -> bool:
    """Whether a recipe can have this name: printable text that starts with a letter or digit, without / and \\, not `store`."""
    return name.isprintable() and _RECIPE_NAME.fullmatch(name) is not None


def _home() -> Path:
    return Path(os.environ.get(VARIABLE) or ".").expanduser()
