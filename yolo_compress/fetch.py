"""The only verb that uses the network: official weights and COCO through Ultralytics' own downloader, and the digits."""

from __future__ import annotations

import os
import re
import runpy
from pathlib import Path

from yolo_compress.errors import EnvironmentLacks, RecipeError
from yolo_compress.hardening import harden
from yolo_compress.weights import FOLDER

ASSETS = "https://github.com/ultralytics/assets/releases/download/v0.0.0"
COCO = {
    "coco128": [f"{ASSETS}/coco128.zip"],
    "coco": [
        f"{ASSETS}/coco2017labels.zip",
        "http://images.cocodataset.org/zips/train2017.zip",
        "http://images.cocodataset.org/zips/val2017.zip",
    ],
}
DATASETS = Path("datasets")


def fetch(name: str) -> Path:
    """Bring `yolov8{n,s,m,l,x}.pt`, `coco128`, `coco` or `digits` (drawn here, no network) to where recipes look.

    Raises:
        RecipeError: Another name.
        EnvironmentLacks: No network; says where to put the file.
    """
    if name == "digits":
        return draw_digits()
    if re.fullmatch(r"yolov8[nsmlx]\.pt", name):
        return _download(
            f"https://github.com/ultralytics/assets/releases/download/v8.4.0/{name}", FOLDER, FOLDER / name
        )
    if name in COCO:
        for url in COCO[name]:
            images = "zips" in url
            folder = DATASETS / "coco" / "images" if images else DATASETS
            _download(url, folder, folder / Path(url).stem)
        return DATASETS / name
    raise RecipeError(f"fetch {name}: expected yolov8n.pt to yolov8x.pt, coco128, coco or digits")


def draw_digits() -> Path:
    """Draw the embedded data set into `datasets/digits`, where that is not done yet."""
    script = DATASETS / "digits.py"
    if not script.is_file():
        raise EnvironmentLacks(f"{script}: not here; run in the folder of the checkout")
    out = DATASETS / "digits"
    runpy.run_path(str(script))["draw"](out)
    return out


def _download(url: str, folder: Path, done: Path) -> Path:
    if done.exists():
        return done
    harden()
    os.environ.pop("YOLO_OFFLINE", None)
    from ultralytics.utils.downloads import safe_download

    folder.mkdir(parents=True, exist_ok=True)
    try:
        safe_download(url, dir=folder, retry=1, progress=True, unzip=url.endswith(".zip"), delete=url.endswith(".zip"))
    except (OSError, RuntimeError) as error:
        raise EnvironmentLacks(
            f"{url} cannot be fetched ({type(error).__name__}: {str(error).splitlines()[0]}); "
            f"fetch it where there is a network and put it at {done}"
        ) from error
    if not done.exists():
        raise EnvironmentLacks(f"{url} was fetched but {done} is not there; unpack it by hand")
    return done
