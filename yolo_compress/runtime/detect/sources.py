"""Sources of images: an image file, a folder, a video or a camera."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Optional, Sequence, Union

import numpy as np

from ..errors import RuntimeUnavailable, SourceError
from .pre import read_image

IMAGE_SUFFIXES = ("avif", "bmp", "dng", "jp2", "jpeg", "jpg", "mpo", "npy", "png", "tif", "tiff", "webp")

MISSING = 0.02  # share of frames that may be missing; some containers only estimate the count from duration and rate


class SourceImage(NamedTuple):
    """An image that is not decoded yet. `read` returns an (H, W, 3) uint8 RGB array, or raises `pre.UnreadableImage`."""

    name: str
    read: Callable[[], np.ndarray]


class Source(NamedTuple):
    """Images in order, and their number. The number is None for a camera, and for a video that does not state its length."""

    images: Iterator[SourceImage]
    total: Optional[int]


def open_source(source: Union[str, Path]) -> Source:
    """Open an image file, a folder (sorted by name, without subfolders), a video or a camera.

    Args:
        source: a path, an address with `://`, or the number of a camera.

    Raises:
        SourceError: the source does not exist, holds no image, or cannot be opened. If a camera is lost or a video is truncated,
            the iterator over the images raises this error.
        RuntimeUnavailable: OpenCV, which a video or camera needs, is not installed.
    """
    text = str(source)
    number = text.isdecimal() and len(text) < 9
    if number or "://" in text:
        return _video(int(text) if number else text, f"camera {text}" if number else text)
    path = Path(text)
    try:
        if path.is_dir():
            return _images(_listed(path))
        if not path.exists():
            raise SourceError(f"{path}: no such file or folder")
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror or error}") from error
    return _images([path]) if _is_image(path) else _video(text, path.name)


def _is_image(path: Path) -> bool:
    return path.suffix[1:].lower() in IMAGE_SUFFIXES


def _listed(folder: Path) -> Sequence[Path]:
    found = sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_file() and _is_image(Path(entry.name)))
    if not found:
        raise SourceError(f"{folder}: holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return found


def _images(paths: Sequence[Path]) -> Source:
    return Source((SourceImage(str(path), partial(read_image, path)) for path in paths), len(paths))


def _video(opened: Union[int, str], name: str) -> Source:
    try:
        import cv2
    except ImportError as error:
        raise RuntimeUnavailable(
            f"{name}: videos and cameras need OpenCV, which cannot be imported ({error})", "pip install opencv-python"
        ) from error
    capture = cv2.VideoCapture(opened)
    if not capture.isOpened():
        capture.release()
        raise SourceError(f"{name}: OpenCV {cv2.__version__} cannot open it as a video or camera")
    count = max(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0) if isinstance(opened, str) else 0
    live = not count and (isinstance(opened, int) or "://" in opened)
    return Source(_frames(cv2, capture, name, count, live), count or None)


def _frames(cv2: Any, capture: Any, name: str, count: int, live: bool) -> Iterator[SourceImage]:
    """Yield the frames of a video or camera. Frames are decoded in sequence; `SourceImage.read` converts BGR to RGB.

    Args:
        count: number of frames that the video states; 0 if it states none.
        live: whether the source is a camera, which has no end.
    """
    number = 0
    try:
        while True:
            success, bgr_HW3 = capture.read()
            if not success:
                break
            yield SourceImage(f"{name}#{number}", partial(cv2.cvtColor, bgr_HW3, cv2.COLOR_BGR2RGB))
            number += 1
    finally:
        capture.release()
    if not number:
        raise SourceError(f"{name}: gives no frame")
    if live:
        raise SourceError(f"{name}: lost after {number} frames; check the camera and start again")
    if number < count * (1 - MISSING):
        raise SourceError(f"{name}: ends after {number} of {count} frames; the video is truncated or damaged")
