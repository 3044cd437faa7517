"""The network input is Ultralytics' own, pixel for pixel; without cv2 it is within a grey level of it."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image

from yolo_compress.nets.hardening import harden
from yolo_compress.runtime.detect import pre

SHAPES = [
    (64, 64),
    (48, 97),
    (97, 48),
    (33, 200),
    (200, 31),
    (480, 641),
    (1, 300),
    (301, 2),
    (7, 5),
    (128, 128),
    (427, 640),
]
SIZES = [(64, 64), (96, 96), (64, 128), (160, 96)]


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def as_ultralytics(image_HW3: np.ndarray, imgsz_hw: tuple[int, int], folder: Path) -> np.ndarray:
    """What YOLODataset(rect=False) gives the validator: load_image, then LetterBox(scaleup=False), BGR to RGB, / 255."""
    harden()
    from ultralytics.data.augment import LetterBox
    from ultralytics.data.base import BaseDataset

    file = folder / "image.png"
    cv2.imwrite(str(file), image_HW3[..., ::-1])
    dataset = SimpleNamespace(
        ims=[None], im_files=[str(file)], npy_files=[file.with_suffix(".npy")], cache=False, imgsz=max(imgsz_hw),
        cv2_flag=cv2.IMREAD_COLOR, channels=3, augment=False, prefix="",
    )  # fmt: skip
    image, _, _ = BaseDataset.load_image(dataset, 0)  # type: ignore[arg-type]
    placed = LetterBox(new_shape=imgsz_hw, scaleup=False)(image=image)
    return placed[..., ::-1].transpose(2, 0, 1).astype(np.float32) / np.float32(255)


@pytest.mark.parametrize("imgsz", SIZES)
def test_pixels_are_those_of_ultralytics_validator(imgsz: tuple[int, int], tmp_path: Path) -> None:
    for seed, (height, width) in enumerate(SHAPES):
        image = picture(height, width, seed)
        ours, _ = pre.letterbox(image, imgsz)
        assert ours.dtype == np.float32 and ours.flags.c_contiguous
        assert np.array_equal(ours, as_ultralytics(image, imgsz, tmp_path)), f"{height}x{width} into {imgsz}"


@pytest.mark.parametrize("target", [(32, 32), (64, 48), (50, 99), (240, 321), (641, 480), (700, 900), (96, 200)])
def test_resizing_without_opencv_is_within_one_grey_level(target: tuple[int, int]) -> None:
    for shape in [(480, 642), (64, 96), (37, 53)]:
        image = picture(*shape)
        apart = np.abs(cv2.resize(image, target[::-1]).astype(int) - pre.resize_numpy(image, *target))
        assert apart.max() <= 1 and (apart > 0).mean() < 0.01, f"{shape} to {target}"


def test_exact_halves_are_opencvs_mean() -> None:
    image = picture(64, 96)
    assert np.array_equal(cv2.resize(image, (48, 32)), pre.resize_numpy(image, 32, 48))


def test_letterbox_without_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(427, 640)
    with_cv2, placed = pre.letterbox(image, (96, 96))
    monkeypatch.setattr(pre, "_cv2", lambda: None)
    without, same = pre.letterbox(image, (96, 96))
    assert placed == same and np.abs(with_cv2 - without).max() <= 1.01 / 255


def test_a_letterbox_of_the_right_size_changes_nothing() -> None:
    image = picture(64, 64)
    chw, placed = pre.letterbox(image, (64, 64))
    assert np.array_equal(np.rint(chw * 255).astype(np.uint8).transpose(1, 2, 0), image)
    assert placed == pre.Letterbox((1.0, 1.0), 0, 0, 64, 64)


def test_border_is_grey_and_centred() -> None:
    chw, placed = pre.letterbox(np.zeros((32, 64, 3), np.uint8), (64, 64))
    assert (placed.pad_top, placed.pad_left) == (16, 0)
    assert np.all(chw[:, :16] == np.float32(114) / np.float32(255)) and np.all(chw[:, 16:48] == 0)
    assert np.all(chw[:, 48:] == np.float32(114) / np.float32(255))


@pytest.mark.parametrize(
    "wrong", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)]
)
def test_only_colour_bytes_are_letterboxed(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8 RGB"):
        pre.letterbox(wrong, (64, 64))


def _save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)  # type: ignore[arg-type]
    return path


def test_reading_is_rgb_and_upright_with_both_decoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    red = np.zeros((8, 16, 3), np.uint8)
    red[..., 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned by 90 degrees
    turned = _save(tmp_path / "turned.jpg", Image.fromarray(red), exif=exif)
    grey = _save(tmp_path / "grey.png", Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)))
    deep = _save(tmp_path / "deep.png", Image.fromarray((np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)))
    alpha = _save(tmp_path / "alpha.png", Image.fromarray(np.dstack([red, np.full((8, 16), 9, np.uint8)])))
    files = [turned, grey, deep, alpha]
    by_opencv = [pre.read_image(file) for file in files]
    monkeypatch.setattr(pre, "_cv2", lambda: None)
    for file, expected in zip(files, by_opencv, strict=True):
        found = pre.read_image(file)
        assert found.shape == expected.shape and found.dtype == np.uint8, file.name
        assert np.abs(found.astype(int) - expected).max() <= (3 if file.suffix == ".jpg" else 0), file.name
    assert by_opencv[0].shape == (16, 8, 3) and by_opencv[0][..., 0].min() > 250 and by_opencv[0][..., 2].max() < 5


@pytest.mark.parametrize("decoder", ["opencv", "pillow"])
@pytest.mark.parametrize("content", [None, b"", b"this is no image"])
def test_unreadable_images_are_named(
    content: bytes | None, decoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if decoder == "pillow":
        monkeypatch.setattr(pre, "_cv2", lambda: None)
    file = tmp_path / "broken.png"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(pre.UnreadableImage, match="broken.png"):
        pre.read_image(file)


def test_pillow_refuses_a_truncated_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = io.BytesIO()
    Image.fromarray(picture(64, 64)).save(whole, "PNG")
    (tmp_path / "half.png").write_bytes(whole.getvalue()[:2000])
    monkeypatch.setattr(pre, "_cv2", lambda: None)
    with pytest.raises(pre.UnreadableImage, match="half.png"):
        pre.read_image(tmp_path / "half.png")


@pytest.mark.parametrize(
    ("shape", "dtype", "says"),
    [
        ("(3000000, 3000000, 3)", "|u1", "stated, 12 bytes there"),
        ("(2, 2, 3)", "<V9223372036854775000", "a.npy: "),
        ("(-2, -2, 3)", "|u1", "stated, 12 bytes there"),
        ("(2, 2, 2)", "|u1", "stated, 12 bytes there"),
        ("(2, 2, 3)", "|O", "a.npy: "),
        ("(1000000,) * 9", "|u1", "a.npy: "),
    ],
)
def test_a_npy_header_that_states_more_than_there_is_is_refused(
    tmp_path: Path, shape: str, dtype: str, says: str
) -> None:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(12))
    with pytest.raises(pre.UnreadableImage, match=says):
        pre.read_image(tmp_path / "a.npy")


def test_a_npy_of_a_later_format_is_refused_and_a_sound_one_read(tmp_path: Path) -> None:
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    for order in (image, np.asfortranarray(image)):
        np.save(tmp_path / "a.npy", order)
        assert np.array_equal(pre.read_image(tmp_path / "a.npy"), image)
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes().replace(b"NUMPY\x01", b"NUMPY\x09"))
    with pytest.raises(pre.UnreadableImage, match=r"format 9.0 of .npy"):
        pre.read_image(tmp_path / "a.npy")


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '|u1', 'fortran_order': False, 'shape': (1,",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (1L, 1, 3), '}",
        "{'descr': '|u1', 'shape': (1, 1, 3)}",
        "  {'descr'",
        "(" * 300,
        "",
    ],
)
def test_a_npy_whose_header_is_no_python(tmp_path: Path, header: str) -> None:
    """numpy reads it as Python, and lets what the tokenizer raises through."""
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(3)
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(pre.UnreadableImage, match=r"a\.npy: not a .npy header"):
        pre.read_image(tmp_path / "a.npy")
