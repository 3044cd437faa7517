"""Draw the built-in data set: scenes of real handwritten digits. Equal seeds and library versions give equal bytes.

The 1,797 digits are the scans that scikit-learn ships (8 x 8 px, 16 grey levels, from the UCI "Optical Recognition of Handwritten
Digits" set). Every fifth scan (index % 5 == 0) appears only in validation scenes. The other scans appear only in training scenes. A
scene has 3 to 7 digits of different size, angle and contrast. They are lighter or darker than the background, which has gradients,
noise, strokes and blobs. A box fits tightly around the rotated ink. Later digits may cover earlier ones, but at most `MAX_COVERED`
of a digit's ink, so that people can still read every labelled digit.

    python -m yolo_compress.data.digits FOLDER [--train 600] [--val 150] [--imgsz 128] [--seed 0]
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import TypedDict

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from yolo_compress import progress
from yolo_compress.errors import CompressError, RecipeError, StorageError
from yolo_compress.files.atomic import storage_errors
from yolo_compress.files.lock import lock
from yolo_compress.runtime import json_text
from yolo_compress.runtime.commands.command_line import Parser

VERSION = 1  # increase this number when the same parameters give other bytes
VAL_EVERY = 5  # source digits with index % 5 == 0 are for validation
MAX_COVERED = 0.4  # fraction of a digit's ink; above it, people cannot read the digit either
INK = 0.35  # a pixel with at least this alpha belongs to the digit; its box and its covered area follow from that
RECORD = "digits.json"


def draw(out: Path, train: int = 600, val: int = 150, imgsz: int = 128, seed: int = 0) -> None:
    """Draw `train` and `val` square scenes of `imgsz` px to images/{train,val} and labels/{train,val} under `out`.

    If `out` already has exactly these files, nothing is done. Otherwise the scenes are drawn into a folder `out`.partial, which
    is then renamed, so `out` is never incomplete. A folder drawn with other parameters is replaced.

    Raises:
        RecipeError: A count is below 1, or the images are too small for digits.
        StorageError: `out` exists and was not drawn by this function, or the file system fails.
    """
    if min(train, val) < 1 or imgsz < 64:
        raise RecipeError(
            f"digits: got train={train}, val={val}, imgsz={imgsz}, expected at least one scene in each split and 64 px"
        )
    parameters = {"version": VERSION, "train": train, "val": val, "imgsz": imgsz, "seed": seed}
    if is_complete(out, parameters):
        return
    with lock(out.with_name(out.name + ".lock"), f"drawing {out}"), storage_errors(out, "draw"):
        if is_complete(out, parameters):  # another process drew it meanwhile
            return
        if out.exists() and not (out / RECORD).is_file() and any(out.iterdir()):
            raise StorageError(f"{out} has no {RECORD}, so this program did not draw it: move it away")
        progress.say(f"digits: drawing {train} training and {val} validation images of {imgsz} px into {out}")
        partial = out.with_name(out.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        files = _draw_scenes(partial, parameters)
        record = {"parameters": parameters, "files": files}
        (partial / RECORD).write_text(json.dumps(record, indent=0, sort_keys=True) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        os.replace(partial, out)


def _draw_scenes(out: Path, parameters: dict[str, int]) -> dict[str, str]:
    """Draw the scenes, write images and labels to `out`, and return the SHA-256 of each file by its path in the folder.

    A scene depends only on the seed, the split and the scene's number.
    """
    scans, classes = source_digits()
    imgsz, files = parameters["imgsz"], {}
    for split, name in enumerate(("train", "val")):
        sources = split_sources(len(scans), name)
        for folder in ("images", "labels"):
            (out / folder / name).mkdir(parents=True)
        for i in range(parameters[name]):
            rng = np.random.default_rng([parameters["seed"], split, i])
            image, boxes = scene(rng, scans, classes, sources, imgsz)
            png, text = _png(image), label_rows(boxes, imgsz).encode()
            for path, data in ((f"images/{name}/{i:05d}.png", png), (f"labels/{name}/{i:05d}.txt", text)):
                (out / path).write_bytes(data)
                files[path] = hashlib.sha256(data).hexdigest()
    return files


class Record(TypedDict):
    """Content of the file that describes the scenes in a folder: the parameters, and the SHA-256 of every file."""

    parameters: dict[str, int]
    files: dict[str, str]  # path in the folder -> SHA-256, hex


def is_complete(out: Path, parameters: dict[str, int]) -> bool:
    """Return whether `out` was drawn with `parameters` and no file has changed (0.1 s for 1,500 files)."""
    try:
        record: Record = json_text.read(out / RECORD)
        return record["parameters"] == parameters and all(
            hashlib.sha256((out / path).read_bytes()).hexdigest() == sha256 for path, sha256 in record["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def source_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return the scans of handwritten digits as (1797, 8, 8) float 0..1, and their classes as (1797,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images / 16.0, digits.target


def split_sources(count: int, split: str) -> np.ndarray:
    """Return the indices of the scans that scenes of a split use. The two splits share no scan."""
    index = np.arange(count)
    return index[(index % VAL_EVERY == 0) == (split == "val")]


def scene(
    rng: np.random.Generator, scans: np.ndarray, classes: np.ndarray, sources: np.ndarray, imgsz: int
) -> tuple[np.ndarray, list[tuple[int, int, int, int, int]]]:
    """Draw a scene. Return it as (H, W, 3) uint8, and its boxes as (class, left, top, right, bottom).

    The boxes are in px, without the pixels at `right` and `bottom`.
    """
    canvas = background(rng, imgsz)
    visible: list[tuple[np.ndarray, int]] = []  # for each digit: mask of its visible ink, and area of all its ink in px
    labels = []
    wanted = int(rng.integers(3, 8))
    for _ in range(40):  # tries; 3 digits always fit
        layer = _stamp(rng, scans[source := int(rng.choice(sources))], imgsz)
        ink = layer >= INK
        uncovered = [(old & ~ink, area) for old, area in visible]
        if any(old.sum() < (1 - MAX_COVERED) * area for old, area in uncovered):
            continue
        canvas = _paint(rng, canvas, layer, ink)
        visible = [*uncovered, (ink, int(ink.sum()))]
        rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
        labels.append((int(classes[source]), int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))
        if len(labels) == wanted:
            break
    noisy = canvas + rng.normal(0, rng.uniform(2, 8), canvas.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8), labels


def background(rng: np.random.Generator, imgsz: int) -> np.ndarray:
    """Draw a background without digits, (H, W, 3) float32 0..255: a gradient, soft noise, blobs and pen strokes."""
    ramp = np.linspace(0, 1, imgsz, dtype=np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    mix = np.clip(0.5 + np.cos(angle) * (ramp[None, :] - 0.5) + np.sin(angle) * (ramp[:, None] - 0.5), 0, 1)[..., None]
    low, high = rng.uniform(20, 235, (2, 3))
    soft = Image.fromarray(rng.normal(0, 1, (8, 8)).astype(np.float32)).resize((imgsz, imgsz), Image.Resampling.BICUBIC)
    canvas = low * (1 - mix) + high * mix + np.asarray(soft)[..., None] * rng.uniform(0, 22)
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(2, 7))):
        x, y = rng.uniform(0, imgsz, 2)
        w, h = rng.uniform(0.03, 0.2, 2) * imgsz
        pen.ellipse((x - w, y - h, x + w, y + h), fill=_near(rng, image, x, y))
    for _ in range(int(rng.integers(2, 8))):
        points = rng.uniform(0, imgsz, 2) + np.cumsum(rng.normal(0, imgsz / 10, (int(rng.integers(2, 5)), 2)), axis=0)
        pen.line([tuple(p) for p in points], fill=_near(rng, image, *points[0]), width=int(rng.integers(1, 4)))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.5))), dtype=np.float32)


def _near(rng: np.random.Generator, image: Image.Image, x: float, y: float) -> tuple[int, ...]:
    """Return a colour similar to the image's colour at (x, y). Strokes and blobs then have less contrast than most digits."""
    at = image.getpixel((int(np.clip(x, 0, image.width - 1)), int(np.clip(y, 0, image.height - 1))))
    return tuple(int(c) for c in np.clip(np.array(at) + rng.normal(0, 40, 3), 0, 255))


def _stamp(rng: np.random.Generator, scan: np.ndarray, imgsz: int) -> np.ndarray:
    """Return an empty layer (H, W) 0..1 with one scan drawn at a random place.

    The scan's side is 17 to 38 % of the layer's side. The scan is rotated by up to 25 degrees.
    """
    height = rng.uniform(0.17, 0.38) * imgsz
    size = (round(height * rng.uniform(0.75, 1.05)), round(height))
    framed = Image.fromarray(np.pad(scan, 1).astype(np.float32))  # a blank border, so that the ink fades out
    glyph = framed.resize(size, Image.Resampling.BICUBIC)
    # at most 25 degrees, so that 6 and 9 stay different
    glyph = glyph.rotate(rng.uniform(-25, 25), Image.Resampling.BICUBIC, expand=True)
    alpha = np.clip(np.asarray(glyph) * 1.3, 0, 1)
    rows, columns = np.flatnonzero((alpha >= INK).any(1)), np.flatnonzero((alpha >= INK).any(0))
    alpha = alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    top, left = (int(rng.integers(0, imgsz - side + 1)) for side in alpha.shape)
    layer = np.zeros((imgsz, imgsz), np.float32)
    layer[top : top + alpha.shape[0], left : left + alpha.shape[1]] = alpha
    return layer


def _paint(rng: np.random.Generator, canvas: np.ndarray, layer: np.ndarray, ink: np.ndarray) -> np.ndarray:
    """Return `canvas` with the digit in one colour, 60 to 170 grey levels lighter or darker than the area it covers."""
    under = canvas[ink].mean(axis=0)
    step = rng.uniform(60, 170) * (1 if rng.random() < (255 - under.mean()) / 255 else -1)
    if not 0 <= under.mean() + step <= 255:
        step = -step
    colour = np.clip(under + step + rng.normal(0, 15, 3), 0, 255)
    return canvas * (1 - layer[..., None]) + colour.astype(np.float32) * layer[..., None]


def label_rows(boxes: list[tuple[int, int, int, int, int]], imgsz: int) -> str:
    """Return boxes in px as the text of a YOLO label file."""
    rows = (
        f"{c} {(x1 + x2) / 2 / imgsz:.6f} {(y1 + y2) / 2 / imgsz:.6f} {(x2 - x1) / imgsz:.6f} {(y2 - y1) / imgsz:.6f}\n"
        for c, x1, y1, x2, y2 in boxes
    )
    return "".join(rows)


def _png(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG", compress_level=6)
    return out.getvalue()


def main(argv: list[str]) -> int:
    parser = Parser(description="Draw scenes of handwritten digits with their boxes.")
    parser.add_argument("out", type=Path)
    for name, default in (("train", 600), ("val", 150), ("imgsz", 128), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args(argv)
    try:
        draw(**vars(args))
        progress.result(str(args.out))
    except CompressError as error:
        progress.notice(f"error: {error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
