"""Pictures end where their source does; a camera that is lost or a video that is cut short is an error, after all its frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from yolo_compress.runtime.detect.sources import open_source
from yolo_compress.runtime.detect.stream import Pipeline
from yolo_compress.runtime.errors import SourceError


class Capture:
    """A cv2.VideoCapture that gives `frames` and claims `count`."""

    frames, count = 3, 0.0

    def __init__(self, opened: int | str) -> None:
        self.left = self.frames

    def isOpened(self) -> bool:
        return True

    def get(self, key: int) -> float:
        return self.count

    def read(self) -> tuple[bool, np.ndarray | None]:
        self.left -= 1
        return (self.left >= 0, np.zeros((8, 8, 3), np.uint8) if self.left >= 0 else None)

    def release(self) -> None: ...


def names(source: str | Path) -> tuple[list[str], str | None]:
    """Names of all pictures, and what the source said at its end."""
    found: list[str] = []
    try:
        found.extend(picture.name for picture in open_source(source).images)
    except SourceError as error:
        return found, str(error)
    return found, None


@pytest.mark.fault(83)
@pytest.mark.parametrize(
    ("source", "frames", "count", "says"),
    [
        ("0", 3, 0.0, "camera 0: lost after 3 frames"),
        ("0", 0, 0.0, "camera 0: gives no frame"),
        ("rtsp://robot/front", 3, -2.5e17, "rtsp://robot/front: lost after 3 frames"),
        ("https://robot/a.mp4", 3, 3.0, None),
        ("https://robot/a.mp4", 3, 9.0, "ends after 3 of 9 frames"),
        ("a.mp4", 40, 100.0, "a.mp4: ends after 40 of 100 frames"),
        ("a.mp4", 97, 100.0, "ends after 97 of 100 frames"),
        ("a.mp4", 99, 100.0, None),
        ("a.mp4", 101, 100.0, None),
        ("a.h264", 3, 0.0, None),
    ],
)
def test_how_a_source_ends(
    source: str, frames: int, count: float, says: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if "." in source and "://" not in source:
        Path(source).write_bytes(b"video")
    monkeypatch.setattr(Capture, "frames", frames)
    monkeypatch.setattr(Capture, "count", count)
    monkeypatch.setattr(cv2, "VideoCapture", Capture)
    found, said = names(source)
    assert len(found) == frames
    assert said is None if says is None else said is not None and says in said


@pytest.mark.fault(83)
def test_a_video_file_that_is_cut_short(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.avi", tmp_path / "cut.avi"
    writer = cv2.VideoWriter(str(whole), cv2.VideoWriter.fourcc(*"MJPG"), 25.0, (64, 48))
    for number in range(30):
        writer.write(np.random.default_rng(number).integers(0, 256, (48, 64, 3), np.uint8))
    writer.release()
    assert names(whole) == ([f"whole.avi#{number}" for number in range(30)], None)
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    found, said = names(cut)
    assert 0 < len(found) < 20 and said is not None and f"ends after {len(found)} of 30 frames" in said


class Still:
    """A backend that finds nothing."""

    needs_nms = True
    names, imgsz, channels = ("bolt",), (32, 32), 3

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def __call__(self, images_BCHW: np.ndarray) -> np.ndarray:
        return np.zeros((len(images_BCHW), 5, 21), np.float32)

    def __exit__(self, *exception: Any) -> None: ...


@pytest.mark.parametrize("batch", [1, 4])
def test_what_came_of_the_frames_before_the_loss_is_given_first(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Capture, "frames", 11)
    monkeypatch.setattr(cv2, "VideoCapture", Capture)
    found = []
    with Pipeline([lambda: Still(batch)] * 2) as pipeline, pytest.raises(SourceError, match="lost after 11 frames"):
        found.extend(one.name for one in pipeline(open_source("0").images))
    assert found == [f"camera 0#{number}" for number in range(11)]
