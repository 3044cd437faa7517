"""Image files: a file that OpenCV decodes gets the size that OpenCV gives it; any other file is a finding, never a crash."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from yolo_compress.data import images


def encoded(
    seed: int, kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (24, 16), **options: object
) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, kind, **options)
    return out.getvalue()


def png_16_bit_rgb() -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\x12\x34" * 48) * 16)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def bomb() -> bytes:
    """A PNG that claims 20,000 x 20,000 px in a few bytes."""
    data = bytearray(encoded(0))
    data[16:24] = struct.pack(">II", 20_000, 20_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def oriented(kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return encoded(0, kind, exif=exif)


FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (24, 16), "red")]}
BAD_IMAGES = {
    "zero bytes": (b"", "empty file"),
    "html": (b"<!DOCTYPE html>\n<html><body>404</body></html>", "an HTML page, not an image"),
    "junk": (bytes(range(256)) * 4, "not an image of a known format"),
    "heic": (b"\0\0\0\x18ftypheic" + bytes(100), "HEIF images are not supported"),
    "gif": (encoded(0, "GIF"), "GIF images are not supported"),
    "animated gif": (encoded(0, "GIF", **FRAMES), "GIF images are not supported"),
    "animated png": (encoded(0, "PNG", **FRAMES), "2 frames; one image per file is needed"),
    "animated webp": (encoded(0, "WEBP", **FRAMES), "2 frames; one image per file is needed"),
    "16 bit grey": (encoded(0, "PNG", "I;16"), "PNG of mode I;16, 16 bits a channel; convert it to 8-bit RGB"),
    "16 bit rgb": (png_16_bit_rgb(), "PNG of mode RGB, 16 bits a channel; convert it to 8-bit RGB"),
    "float": (encoded(0, "TIFF", "F"), "TIFF of mode F, 32 bits a channel; convert it to 8-bit RGB"),
    "1x1": (encoded(0, size=(1, 1)), "1 x 1, smaller than 10 px"),
    "bomb": (bomb(), "20000 x 20000 is over 100 million pixels"),
    "turned webp": (
        oriented("WEBP", 6),
        "WEBP with EXIF orientation 6, which decoders treat differently; save it upright",
    ),
    "png without end": (encoded(0)[:-12], "corrupt image (no end chunk)"),
    "jpeg with tail": (
        encoded(0, "JPEG") + b"\0",
        "no end-of-image marker at the end: the file is cut short or has more bytes; save it again",
    ),
}  # fmt: skip


@pytest.mark.fault(13)
@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_image(name: str) -> None:
    content, what = BAD_IMAGES[name]
    with images.quiet_pillow(), pytest.raises(images.Finding) as caught:
        images.probe(content)
    assert str(caught.value) == what


@pytest.mark.fault(13)
def test_findings_do_not_depend_on_a_patched_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ultralytics replaces PIL.Image.open by one that installs packages when it meets an unknown file."""

    def install(*_: object, **__: object) -> None:
        pytest.fail("PIL.Image.open was called")

    monkeypatch.setattr(Image, "open", install)
    for content, what in BAD_IMAGES.values():
        with images.quiet_pillow(), pytest.raises(images.Finding) as caught:
            images.probe(content)
        assert str(caught.value) == what
    assert images.probe(encoded(1, "MPO")) == (24, 16)


def test_findings_do_not_depend_on_registered_decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    Image.init()
    monkeypatch.setattr(Image, "ID", ["HEIF", *Image.ID])
    monkeypatch.setitem(Image.OPEN, "HEIF", (lambda *_: pytest.fail("pi-heif was asked"), None))
    with pytest.raises(images.Finding, match="not an image of a known format"):
        images.probe(BAD_IMAGES["junk"][0])


@pytest.mark.fault(13)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_cut_images_are_all_found(kind: str) -> None:
    whole = encoded(3, kind)
    assert images.probe(whole) == (24, 16)
    for end in range(0, len(whole) - 1, 10):
        with pytest.raises(images.Finding):
            images.probe(whole[:end])


@pytest.mark.fault(13)
@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("JPEG", "CMYK"), ("JPEG", "L"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "LA"), ("PNG", "1")),
        *(("TIFF", "CMYK"), ("WEBP", "RGBA"), ("BMP", "RGB"), ("MPO", "RGB"), ("JPEG2000", "RGB")),
    ],
)
def test_accepted_kinds_have_the_size_that_opencv_decodes(kind: str, mode: str) -> None:
    cv2 = pytest.importorskip("cv2")
    content = encoded(1, kind, mode)
    decoded = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    assert images.probe(content) == decoded.shape[1::-1]
    pillow = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)
    assert np.abs(decoded[..., ::-1] - pillow).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_gives_the_size_of_the_loader(orientation: int) -> None:
    cv2 = pytest.importorskip("cv2")
    content = oriented("JPEG", orientation)
    assert images.probe(content) == cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR).shape[1::-1]
