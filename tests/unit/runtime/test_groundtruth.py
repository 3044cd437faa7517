"""Labels on the robot are the workstation's: the same boxes, the same digest; what would not compare is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from yolo_compress.data.dataset import load
from yolo_compress.evaluate.coco import absolute_boxes
from yolo_compress.runtime.errors import SourceError
from yolo_compress.runtime.files import sha256_file
from yolo_compress.runtime.measure.groundtruth import absolute, coco_file, image_set, yolo_folder

NAMES = ("bolt", "nut")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / split / kind).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(generator.integers(0, 256, (40, 60 + i, 3), np.uint8)).save(
                tmp_path / split / "images" / f"{i}.png"
            )
    (tmp_path / "val/labels/0.txt").write_text("0 .5 .5 .2 .4\n1 0.3 0.3 0.1 0.123\n1 0.3 0.3 0.1 0.123\n")
    (tmp_path / "val/labels/1.txt").write_text("1 0.1 0.2 0.5 0.9 0.3 0.4 0.2 0.3\n")
    (tmp_path / "train/labels/0.txt").write_text("0 .5 .5 .2 .4\n1 .2 .2 .1 .1\n")
    (tmp_path / "data.yaml").write_text("path: .\ntrain: train/images\nval: val/images\nnames: [bolt, nut]\n")
    return tmp_path


def test_boxes_and_digest_are_the_workstations(folder: Path) -> None:
    dataset = load(str(folder / "data.yaml"), max_unlabelled=0.7)
    found = yolo_folder(folder / "val", len(NAMES))
    assert [one.image for one in found] == [sample.image for sample in dataset.val]
    for one, sample in zip(found, dataset.val, strict=True):
        assert one.boxes == sample.boxes
        assert np.array_equal(absolute(one.boxes, sample.height, sample.width), absolute_boxes(sample))
    rows = [(sha256_file(one.image), one.boxes) for one in found]
    known = [(sample.sha256, sample.boxes) for sample in dataset.val]
    assert image_set(rows, NAMES) == image_set(known[::-1], NAMES), "in any order"
    assert image_set(rows, NAMES) != image_set(rows[1:], NAMES) != image_set(rows[1:], NAMES[::-1])


@pytest.mark.fault(64)
def test_what_would_not_compare_is_an_error(folder: Path) -> None:
    (folder / "val/labels/2.txt").write_text("0 .5 .5 .2 .4\n2 .5 .5 .2 .4\n")
    with pytest.raises(SourceError, match=r"2\.txt:2: class 2 is outside 0\.\.1"):
        yolo_folder(folder / "val", 2)
    with pytest.raises(SourceError, match="holds no image"):
        yolo_folder(folder / "gone", 2)
    for file in (folder / "val/labels").iterdir():
        file.unlink()
    with pytest.raises(SourceError, match="no label file for any of the 3 images"):
        yolo_folder(folder / "val", 2)


def coco(**changes: Any) -> dict[str, Any]:
    document: dict[str, Any] = {
        "images": [
            {"id": 7, "file_name": "0.png", "width": 60, "height": 40},
            {"id": 9, "file_name": "1.png", "width": 61, "height": 40},
        ],
        "categories": [{"id": 3, "name": "nut"}, {"id": 5, "name": "bolt"}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 3, "bbox": [6, 8, 12, 16], "iscrowd": 0}],
    }
    return {**document, **changes}


def test_a_coco_json_is_read_by_names(tmp_path: Path) -> None:
    (tmp_path / "coco.json").write_text(json.dumps(coco()))
    first, second = coco_file(tmp_path / "coco.json", tmp_path / "images", NAMES)
    assert first.image == tmp_path / "images" / "0.png" and second.boxes == ()
    assert absolute(first.boxes, 40, 60).tolist() == pytest.approx(np.array([[1, 6, 8, 18, 24]]))


@pytest.mark.fault(64)
@pytest.mark.parametrize(
    ("document", "message"),
    [
        (coco(categories=[{"id": 3, "name": "screw"}]), "boxes of screw"),
        (
            coco(annotations=[{"id": 4, "image_id": 7, "category_id": 3, "bbox": [6, 8, 12, 16], "iscrowd": 1}]),
            "annotation 4 is a crowd",
        ),
        (coco(annotations=[{"id": 4, "image_id": 8, "category_id": 3, "bbox": [6, 8, 12, 16]}]), "not a COCO json"),
        (coco(images=[{"id": 7, "file_name": ["a.png"], "width": 64, "height": 48}]), "not a COCO json"),
        ({"images": []}, "not a COCO json"),
        ([], "not a COCO json"),
    ],
)
def test_a_coco_json_that_would_not_compare_is_an_error(document: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "coco.json").write_text(json.dumps(document))
    with pytest.raises(SourceError, match=message):
        coco_file(tmp_path / "coco.json", tmp_path, NAMES)
