"""Data yamls of the package: COCO, COCO128, and two sets of digits, which are drawn on this machine.

Their images are in `home.datasets()` or in a folder of YOLO_COMPRESS_DATA, never in the folder of the code.
"""

from pathlib import Path

from yolo_compress import home

FOLDER = Path(__file__).absolute().parent  # folder of the yamls
SCENES = {"digits": (600, 150), "digits_many": (1500, 300)}  # drawn sets: training and validation scenes of 128 px


def is_drawn(yaml: Path) -> bool:
    """Return whether this is the yaml of a set that `draw_digits` draws, and not a file of the user with the same name."""
    return yaml.parent == FOLDER and yaml.stem in SCENES


def draw_digits(name: str = "digits") -> Path:
    """Draw a set of `SCENES` into its folder in `home.datasets()`, unless it exists. Return the folder.

    Raises:
        StorageError: See `digits.draw`.
    """
    from yolo_compress.data.digits import draw  # imports numpy and Pillow, which `find_yaml` does not need

    folder = home.datasets() / name
    train, val = SCENES[name]
    draw(folder, train, val)
    return folder
