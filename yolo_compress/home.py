"""Where data, weights and artefacts lie: `datasets/` and `weights/` of the working directory, or of `YOLO_COMPRESS_HOME`.

No other file names these two folders, and nothing is ever written beside the code.
"""

import os
from pathlib import Path

VARIABLE = "YOLO_COMPRESS_HOME"


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


def _home() -> Path:
    return Path(os.environ.get(VARIABLE) or ".").expanduser()
