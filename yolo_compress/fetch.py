"""The only verb that uses the network: official weights and COCO through Ultralytics' own downloader, and the digits."""

from __future__ import annotations

import os
from pathlib import Path

from yolo_compress import home
from yolo_compress.atomic import storage_errors
from yolo_compress.datasets import draw_digits
from yolo_compress.errors import EnvironmentLacks, RecipeError
from yolo_compress.hardening import harden
from yolo_compress.weights import OFFICIAL

ASSETS = "https://github.com/ultralytics/assets/releases/download/v0.0.0"
COCO = {  # url -> the folder of `home.datasets()` that is there when it is unpacked
    "coco128": {f"{ASSETS}/coco128.zip": "coco128"},
    "coco": {
        f"{ASSETS}/coco2017labels.zip": "coco/labels",  # and the lists, all under coco/
        "http://images.cocodataset.org/zips/train2017.zip": "coco/images/train2017",
        "http://images.cocodataset.org/zips/val2017.zip": "coco/images/val2017",
    },
}


def fetch(name: str) -> Path:
    """Bring `yolov8{n,s,m,l,x}.pt`, `coco128`, `coco` or `digits` (drawn here, no network) to where recipes look.

    Raises:
        RecipeError: Another name.
        EnvironmentLacks: No network; says where to put the file.
        StorageError: The folder cannot be made, or digits cannot be drawn.
    """
    if name == "digits":
        return draw_digits()
    if OFFICIAL.fullmatch(name):
        url = f"https://github.com/ultralytics/assets/releases/download/v8.4.0/{name}"
        return _download(url, home.weights(), home.weights() / name)
    if name in COCO:
        for url, folder in COCO[name].items():
            done = home.datasets() / folder
            _download(url, done.parent if done.name == Path(url).stem else home.datasets(), done)
        return home.datasets() / name
    raise RecipeError(f"fetch {name}: expected yolov8n.pt to yolov8x.pt, coco128, coco or digits")


def _download(url: str, folder: Path, done: Path) -> Path:
    if done.exists():
        return done
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    harden()
    os.environ.pop("YOLO_OFFLINE", None)
    from ultralytics.utils.downloads import safe_download

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
