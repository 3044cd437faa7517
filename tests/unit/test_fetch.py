"""What `fetch` leaves, with archives of the form of those on the network; nothing is downloaded."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from yolo_compress import fetch, home
from yolo_compress.datayaml import find_yaml, list_images, read_yaml
from yolo_compress.errors import EnvironmentLacks, RecipeError

CONTENT = {
    "coco2017labels.zip": [
        "coco/labels/train2017/1.txt",
        "coco/labels/val2017/2.txt",
        "coco/train2017.txt",
        "coco/val2017.txt",
    ],
    "train2017.zip": ["train2017/1.jpg"],
    "val2017.zip": ["val2017/2.jpg"],
    "coco128.zip": ["coco128/images/train2017/1.jpg", "coco128/labels/train2017/1.txt"],
}


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of archives in place of the network's; the working directory is empty."""
    shelf, user = tmp_path / "shelf", tmp_path / "user"
    shelf.mkdir(), user.mkdir()
    for name, files in CONTENT.items():
        with zipfile.ZipFile(shelf / name, "w") as archive:
            for file in files:
                split = Path(file).stem
                number = {"train2017": 1, "val2017": 2}.get(split)
                archive.writestr(file, f"./images/{split}/{number}.jpg\n" if number else "x")
    local = {name: {str(shelf / Path(url).name): to for url, to in urls.items()} for name, urls in fetch.COCO.items()}
    monkeypatch.setattr(fetch, "COCO", local)
    monkeypatch.chdir(user)
    for name in ("YOLO_COMPRESS_DATA", home.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("YOLO_OFFLINE", "1")  # `fetch` drops it
    return shelf


@pytest.mark.parametrize("name", ["coco", "coco128"])
@pytest.mark.parametrize("folder", [None, "home"])
def test_a_fetched_set_is_what_the_shipped_yaml_reads(
    name: str, folder: str | None, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if folder:
        monkeypatch.setenv(home.VARIABLE, folder)
    assert fetch.fetch(name) == Path(folder or ".") / "datasets" / name
    data = read_yaml(find_yaml(name))
    for split in ("train", "val"):
        listed, findings, _ = list_images(data, split)
        assert len(listed) == 1 and not findings and listed[0].path.is_file()
    assert fetch.fetch(name) == home.datasets() / name  # again: the archives are gone and not asked for
    assert [path.name for path in Path().iterdir()] == [folder or "datasets"]


def test_an_archive_of_another_form_is_no_success(shelf: Path) -> None:
    (shelf / "coco128.zip").unlink()
    with zipfile.ZipFile(shelf / "coco128.zip", "w") as archive:
        archive.writestr("other/1.jpg", "x")
    with pytest.raises(EnvironmentLacks, match=r"coco128\.zip was fetched but datasets/coco128 is not there"):
        fetch.fetch("coco128")


def test_another_name_is_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"fetch yolov9c\.pt: expected yolov8n\.pt to yolov8x\.pt, coco128, coco or digits"
    ):
        fetch.fetch("yolov9c.pt")
