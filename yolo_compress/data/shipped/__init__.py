"""Data sets that come with the package: yamls of COCO, and digits, which are drawn on this machine.

Their images lie in `home.datasets()` or in a folder of YOLO_COMPRESS_DATA, never in the folder of the code.
"""

from pathlib import Path

from yolo_compress import home

FOLDER = Path(__file__).absolute().parent  # of the yamls
DIGITS = FOLDER / "digits.yaml"


def draw_digits() -> Path:
    """Draw the embedded data set into `digits/` of `home.datasets()`, unless it is there; gives the folder.

    Raises:
        StorageError: see `digits.draw`.
    """
    from yolo_compress.data.digits import draw  # numpy and Pillow, which who only asks for a yaml need not wait for

    folder = home.datasets() / DIGITS.stem
    draw(folder)
    return folder
