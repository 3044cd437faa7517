"""Data yamls of the package: COCO, COCO128 and digits. The digits are drawn on this machine.

Their images are in `home.datasets()` or in a folder of YOLO_COMPRESS_DATA, never in the folder of the code.
"""

from pathlib import Path

from yolo_compress import home

FOLDER = Path(__file__).absolute().parent  # folder of the yamls
DIGITS = FOLDER / "digits.yaml"


def draw_digits() -> Path:
    """Draw the digits into `digits/` of `home.datasets()`, unless they exist. Return the folder.

    Raises:
        StorageError: See `digits.draw`.
    """
    from yolo_compress.data.digits import draw  # imports numpy and Pillow, which `find_yaml` does not need

    folder = home.datasets() / DIGITS.stem
    draw(folder)
    return folder
