"""From an image to the model's input, pixel for pixel equal to Ultralytics' validator with `rect=False`.

Shape suffixes: H, W pixels; 3 = RGB; C = channels, 3 (RGB) or 1 (grey). cv2 decodes and scales if it is installed. Otherwise Pillow
decodes, and numpy scales with cv2's fixed-point arithmetic. Less than 1 % of the pixels then differ, by at most one grey level.
"""

from __future__ import annotations

import io
import math
import os
from pathlib import Path
from typing import Any, List, NamedTuple, Optional, Tuple

import numpy as np

NUMPY_MAGIC = b"\x93NUMPY"
PAD_VALUE = 114  # grey of Ultralytics' LetterBox
_UNIT = np.arange(256, dtype=np.float32) / np.float32(255)  # byte -> value of the model's input, 0 to 1
_GREY = _UNIT[PAD_VALUE]
LUMA_3 = np.array([9798, 19235, 3735], np.int32)  # weights of red, green and blue in grey, in units of 1 / 2**15


class UnreadableImage(ValueError):
    """The image file is missing, empty, truncated or in an unknown format."""


class Letterbox(NamedTuple):
    """Placement of an image in the model's input; `post.to_image` inverts it.

    Attributes:
        ratio: (vertical, horizontal) scale: letterboxed px per px of the source image. The two differ only by rounding.
        pad_left, pad_top: width of the grey border, letterboxed px.
        height, width: size of the source image, px.
    """

    ratio: Tuple[float, float]
    pad_left: int
    pad_top: int
    height: int
    width: int


def _cv2() -> Any:
    """Return the cv2 module, or None if it is not installed."""
    try:
        import cv2
    except ImportError:
        return None
    return cv2


def read_image(path: "str | os.PathLike[str]") -> np.ndarray:
    """Read an image as an (H, W, 3) uint8 RGB array, with its EXIF orientation applied. A .npy file holds a decoded image.

    Raises:
        UnreadableImage: the file cannot be read or decoded, or neither OpenCV nor Pillow is installed.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UnreadableImage(f"{path}: {error.strerror or error}") from error
    if not data:
        raise UnreadableImage(f"{path}: empty file")
    if data.startswith(NUMPY_MAGIC):
        return _read_numpy(path, data)
    if _cut_short(data):
        raise UnreadableImage(f"{path}: the file ends before its image does (truncated?)")
    cv2 = _cv2()
    if cv2 is None:
        return _read_with_pillow(path, data)
    try:
        image_HW3 = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:  # more pixels than opencv takes
        raise UnreadableImage(f"{path}: {error}") from error
    if image_HW3 is None:
        raise UnreadableImage(f"{path}: no image that opencv can decode (truncated or of another format?)")
    return cv2.cvtColor(image_HW3, cv2.COLOR_BGR2RGB)


def load_array(data: bytes) -> np.ndarray:
    """Parse the bytes of a `.npy` file.

    numpy allocates the size that the header states before it reads the data. A file of 128 bytes can state 27 TiB, so the
    size is checked first.

    Raises:
        ValueError: the header is damaged, or states another size than the data has.
    """
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError("format {}.{} of .npy, expected 1.0 or 2.0".format(*version))
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, _, dtype = read(file)
    except Exception as error:  # numpy parses it as Python: SyntaxError, TokenError, RecursionError, MemoryError
        raise ValueError(f"not a .npy header ({error})") from error
    stated = dtype.itemsize
    for side in shape:
        stated *= side
    if dtype.hasobject or any(side < 0 for side in shape) or stated != len(data) - file.tell():
        raise ValueError(f"{dtype} {list(shape)} stated, {len(data) - file.tell()} bytes there")
    return np.load(io.BytesIO(data), allow_pickle=False)


def _read_numpy(path: "str | os.PathLike[str]", data: bytes) -> np.ndarray:
    """Read a decoded image from a `.npy` file, such as a golden image of a bundle."""
    try:
        image_HW3 = load_array(data)
    except (ValueError, EOFError) as error:
        raise UnreadableImage(f"{path}: {error}") from error
    if image_HW3.ndim != 3 or image_HW3.shape[2] != 3 or image_HW3.dtype != np.uint8 or 0 in image_HW3.shape:
        raise UnreadableImage(f"{path}: {image_HW3.dtype} {list(image_HW3.shape)}, expected uint8 RGB [H, W, 3]")
    return image_HW3


def _cut_short(data: bytes) -> bool:
    """Return whether a JPEG or PNG has no end marker. cv2 fills the missing part with grey, without an error.

    The search is safe for JPEG, because the scan data never holds an end marker.
    """
    if data[:2] == b"\xff\xd8":
        end = data.rfind(b"\xff\xd9")
        return (
            end < 0 or data.find(b"\xff\xda", end) >= 0
        )  # an end marker before the last scan belongs to the thumbnail
    return data[:4] == b"\x89PNG" and b"IEND" not in data[-4096:]


def _read_with_pillow(path: "str | os.PathLike[str]", data: bytes) -> np.ndarray:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise UnreadableImage(
            f"{path}: neither opencv nor Pillow is installed; pip install opencv-python-headless (or pillow)"
        ) from None
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        if image.mode.startswith("I"):  # 16 bit grey: keep the high byte, as cv2 does
            grey_HW = (np.asarray(image, np.int32) >> 8).astype(np.uint8)
            return np.ascontiguousarray(np.repeat(grey_HW[..., None], 3, axis=2))
        return np.ascontiguousarray(np.asarray(image.convert("RGB"), np.uint8))
    # Errors of Pillow's decoders on bad bytes. ImportError: ultralytics (8.4) patches Image.open to import a HEIF plugin
    # for unknown bytes.
    except (OSError, ValueError, SyntaxError, ImportError, Image.DecompressionBombError) as error:
        raise UnreadableImage(f"{path}: {error}") from error


class Canvas:
    """A reusable array for the model's input. Use it from one thread at a time.

    A grey border is not written again if the next image has the same border. So no other code may write to the array.

    Args:
        images_BCHW: (B, C, H, W) float32 array that `place` fills, image by image.
    """

    def __init__(self, images_BCHW: np.ndarray) -> None:
        self.images_BCHW = images_BCHW
        self._bordered: List[Tuple[int, ...]] = [()] * len(images_BCHW)

    def place(self, index: int, image_HW3: np.ndarray) -> Letterbox:
        """Letterbox an image into element `index` of the batch, and return its placement.

        The image is scaled to the long side of the input, then shrunk until both sides fit, and centred on grey. Ultralytics has
        the same two scaling steps: `BaseDataset.load_image` (rounds up) and `LetterBox(scaleup=False)` (rounds to nearest). For
        square inputs the second step does nothing.
        """
        if image_HW3.ndim != 3 or image_HW3.shape[2] != 3 or image_HW3.dtype != np.uint8 or 0 in image_HW3.shape:
            raise ValueError(f"letterbox takes uint8 RGB [H, W, 3], got {image_HW3.dtype} {list(image_HW3.shape)}")
        chw_CHW = self.images_BCHW[index]
        height, width = image_HW3.shape[:2]
        target_h, target_w = chw_CHW.shape[1:]
        longest = max(target_h, target_w)
        scale = longest / max(height, width)
        image = image_HW3 if len(chw_CHW) == 3 else grey(image_HW3)
        if scale != 1:
            image = resize(image, min(math.ceil(height * scale), longest), min(math.ceil(width * scale), longest))
        fit = min(target_h / image.shape[0], target_w / image.shape[1], 1.0)
        placed_h, placed_w = max(round(image.shape[0] * fit), 1), max(round(image.shape[1] * fit), 1)
        if (placed_h, placed_w) != image.shape[:2]:
            image = resize(image, placed_h, placed_w)
        top, left = round((target_h - placed_h) / 2 - 0.1), round((target_w - placed_w) / 2 - 0.1)
        bottom, right = top + placed_h, left + placed_w
        if self._bordered[index] != (top, left, bottom, right):
            chw_CHW[:, :top] = chw_CHW[:, bottom:] = _GREY
            chw_CHW[:, top:bottom, :left] = chw_CHW[:, top:bottom, right:] = _GREY
            self._bordered[index] = (top, left, bottom, right)
        _normalise(image, chw_CHW[:, top:bottom, left:right])
        return Letterbox((placed_h / height, placed_w / width), left, top, height, width)


def letterbox(
    image_HW3: np.ndarray, imgsz_hw: Tuple[int, int], out: Optional[np.ndarray] = None, channels: int = 3
) -> Tuple[np.ndarray, Letterbox]:
    """Scale one image to the model's input size with grey borders, as float32. `Canvas.place` describes the steps.

    Args:
        image_HW3: (H, W, 3) uint8 RGB array.
        imgsz_hw: height and width of the model's input, px.
        out: (C, H, W) float32 array for the result. None: a new array.
        channels: channels of the model's input: 3 (RGB) or 1 (grey).

    Returns:
        The (C, H, W) float32 array in 0..1, and the placement of the image. The array is `out` if that is not None.
    """
    shape = (channels,) + tuple(imgsz_hw)
    chw_CHW = np.empty(shape, np.float32) if out is None else out
    if chw_CHW.shape != shape or chw_CHW.dtype != np.float32:
        raise ValueError(f"out is {chw_CHW.dtype} {list(chw_CHW.shape)}, expected float32 {list(shape)}")
    return chw_CHW, Canvas(chw_CHW[None]).place(0, image_HW3)


def grey(image_HW3: np.ndarray) -> np.ndarray:
    """Convert a uint8 RGB image to grey, an (H, W, 1) array, as cv2's COLOR_RGB2GRAY (ITU-R BT.601). Grey pixels keep their value."""
    cv2 = _cv2()
    if cv2 is not None:
        return cv2.cvtColor(image_HW3, cv2.COLOR_RGB2GRAY)[..., None]
    return ((image_HW3 @ LUMA_3 + (1 << 14)) >> 15).astype(np.uint8)[..., None]


def _normalise(image_HWC: np.ndarray, out_CHW: np.ndarray) -> None:
    """Write the image into `out_CHW` as float32 in 0..1, channels first."""
    cv2 = _cv2()
    if cv2 is not None:  # half the passes over memory, and cv2 uses all its threads
        for plane_HW, target_HW in zip(cv2.split(image_HWC), out_CHW):
            cv2.LUT(plane_HW, _UNIT, target_HW)
        return
    for plane_HW, target_HW in zip(image_HWC.transpose(2, 0, 1), out_CHW):
        np.copyto(target_HW, plane_HW)
        np.divide(target_HW, np.float32(255), out=target_HW)  # dividing floats in place is faster than dividing bytes


def resize(image_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize a uint8 image bilinearly without antialiasing, as `cv2.resize(..., INTER_LINEAR)`."""
    cv2 = _cv2()
    if cv2 is not None:  # the reshape restores the channel axis of a grey image, which cv2 drops
        return cv2.resize(image_HWC, (width, height), interpolation=cv2.INTER_LINEAR).reshape(height, width, -1)
    return resize_numpy(image_HWC, height, width)


def resize_numpy(image_HW3: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize an image with numpy as cv2's INTER_LINEAR does: 11-bit weights, and the 2x2 mean if both sides are halved."""
    source_h, source_w = image_HW3.shape[:2]
    if (source_h, source_w) == (2 * height, 2 * width):
        wide = image_HW3.astype(np.uint16)
        total = wide[0::2, 0::2] + wide[0::2, 1::2] + wide[1::2, 0::2] + wide[1::2, 1::2]
        return ((total + 2) >> 2).astype(np.uint8)
    x0, x1, left_W, right_W = _taps(source_w, width)
    y0, y1, upper_H, lower_H = _taps(source_h, height)
    wide = image_HW3.astype(np.int32)
    rows = (wide[:, x0] * left_W[:, None] + wide[:, x1] * right_W[:, None]) >> 4
    total = ((rows[y0] * upper_H[:, None, None]) >> 16) + ((rows[y1] * lower_H[:, None, None]) >> 16)
    return np.clip((total + 2) >> 2, 0, 255).astype(np.uint8)


def _taps(source: int, target: int) -> Tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the two source indices and their integer weights (sum 2048) for each target pixel of one axis."""
    position = ((np.arange(target) + 0.5) * (source / target) - 0.5).astype(np.float32)
    first = np.floor(position).astype(np.int64)
    fraction = position - first.astype(np.float32)
    outside = (first < 0) | (first >= source - 1)
    fraction[outside] = 0
    first = np.clip(first, 0, source - 1)
    one = np.float32(2048)
    return (
        first,
        np.minimum(first + 1, source - 1),
        np.rint((np.float32(1) - fraction) * one).astype(np.int32),
        np.rint(fraction * one).astype(np.int32),
    )
