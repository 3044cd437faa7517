"""Check one image file: it must be complete, and OpenCV must decode its format to the same pixels as Pillow.

Pillow decodes each file once, fully. Formats are accepted if cv2.imdecode (5.0.0) was compared with Pillow for them: PNG, JPEG,
BMP, TIFF, WebP, JPEG 2000, AVIF and MPO with 1 or 8 bits; grey, palette, RGB, RGBA (alpha is ignored) or CMYK.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

FORMATS = frozenset({"AVIF", "BMP", "JPEG", "JPEG2000", "MPO", "PNG", "TIFF", "WEBP"})
HEIF_BRANDS = frozenset({b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis"})  # photographs of some phones
MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})
UPRIGHT_ONLY = frozenset({"TIFF", "WEBP", "AVIF", "JPEG2000", "BMP"})  # not every OpenCV applies their EXIF orientation
MIN_SIDE_PX = 10  # Ultralytics drops smaller images
PNG_END = b"IEND\xaeB`\x82"  # the last chunk and its checksum
MAX_PIXELS = 100_000_000  # 300 MB decoded; larger images are decompression bombs, or need tiles


class Finding(ValueError):
    """An image cannot be used. The message says why."""


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Turn off Pillow's warnings about large or wrongly tagged images, which `probe` checks itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def probe(data: bytes) -> tuple[int, int]:
    """Check an encoded image. Return (width, height) in px as cv2.imread decodes it, with EXIF orientation applied.

    Raises:
        Finding: The image cannot be used.
    """
    if not data:
        raise Finding("empty file")
    if data.lstrip()[:1] == b"<" and b"<html" in data[:1024].lower():
        raise Finding("an HTML page, not an image")
    if data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS:
        raise Finding("HEIF images are not supported")
    try:
        with _open(data) as image:
            return _checked_size(image, data)
    except Finding:
        raise
    except Exception as e:  # decoders raise anything on broken files: SyntaxError, struct.error, KeyError, ...
        raise Finding(f"corrupt image ({' '.join(str(e).split())[:100] or type(e).__name__})") from e


def _open(data: bytes):  # type: ignore[no-untyped-def]
    """Open the encoded image `data` with Pillow's own decoders. Only the header is read.

    This function replaces `PIL.Image.open`, which Ultralytics 8.4.190 patches on import. For a file of unknown format, the
    patched function installs pi-heif with pip. Once pi-heif is registered, the same bytes give another finding.

    Raises:
        Finding: The format is not known.
    """
    from PIL import Image

    Image.init()
    for kind in Image.ID:
        if kind == "HEIF":  # registered by pi-heif, if at all
            continue
        factory, accept = Image.OPEN[kind]
        fits = accept(data[:16]) if accept else True
        if isinstance(fits, str) or not fits:  # a str means that Pillow has no codec
            continue
        try:
            return factory(io.BytesIO(data), "")
        except (SyntaxError, IndexError, TypeError, struct.error):  # Image.open tries the next format on these
            continue
    raise Finding("not an image of a known format")


def _checked_size(image, data: bytes) -> tuple[int, int]:  # type: ignore[no-untyped-def]
    """Check and decode an opened image. Return (width, height) in px with EXIF orientation applied."""
    kind, (width, height) = image.format, image.size
    if kind not in FORMATS:
        raise Finding(f"{kind} images are not supported")
    if width * height > MAX_PIXELS:
        raise Finding(f"{width} x {height} is over {MAX_PIXELS // 1_000_000} million pixels")
    if min(width, height) < MIN_SIDE_PX:
        raise Finding(f"{width} x {height}, smaller than {MIN_SIDE_PX} px")
    if getattr(image, "n_frames", 1) > 1 and kind != "MPO":  # an MPO is a JPEG from a camera, followed by a preview
        raise Finding(f"{image.n_frames} frames; one image per file is needed")
    if _bits(image, data) > 8 or image.mode not in MODES:
        raise Finding(f"{kind} of mode {image.mode}, {_bits(image, data)} bits a channel; convert it to 8-bit RGB")
    turned = image.getexif().get(274, 1)  # EXIF Orientation; 5 to 8 swap width and height
    if turned not in (0, 1) and kind in UPRIGHT_ONLY:
        raise Finding(f"{kind} with EXIF orientation {turned}, which decoders treat differently; save it upright")
    try:
        image.load()
    except Exception as e:
        raise Finding(f"corrupt image ({' '.join(str(e).split())[:100] or type(e).__name__})") from e
    if kind == "JPEG" and not data.endswith(b"\xff\xd9"):  # Ultralytics would rewrite the user's file in place
        raise Finding("no end-of-image marker at the end: the file is cut short or has more bytes; save it again")
    if kind == "PNG" and PNG_END not in data:
        raise Finding("corrupt image (no end chunk)")
    return (height, width) if turned in (5, 6, 7, 8) else (width, height)


def _bits(image, data: bytes) -> int:  # type: ignore[no-untyped-def]
    """Return the number of bits per channel in the file. Pillow opens 16-bit RGB as if it had 8 bits."""
    if image.format == "PNG":
        return data[24]  # IHDR bit depth
    if image.format == "TIFF":
        return max(image.tag_v2.get(258, (1,)))
    return {"I": 32, "F": 32}.get(image.mode, 16 if image.mode.startswith("I;16") else 8)
