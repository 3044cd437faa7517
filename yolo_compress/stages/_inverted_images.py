"""Write images inverted from a teacher as PNG files. A killed run continues with the images that are missing."""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import nn

from yolo_compress.data.dataset import Sample
from yolo_compress.distill.inversion import invert
from yolo_compress.files.atomic import atomic_write
from yolo_compress.progress import bar
from yolo_compress.stages import Job

FOLDER = "inverted"


def inverted_samples(job: Job, teacher: nn.Module, count: int, steps: int) -> Sequence[Sample]:
    """Optimise `count` images until the teacher detects objects in them, and return them as samples without boxes.

    The images are also copied to the folder `inverted` of the artefact.
    """
    folder = job.work / FOLDER
    folder.mkdir(exist_ok=True)
    files = [folder / f"{number:06d}.png" for number in range(count)]

    def exist(numbers: range) -> bool:
        return all(files[number].is_file() for number in numbers)

    done = sum(file.is_file() for file in files)
    with bar("invert the teacher", count, "image", done=done) as advance:
        batches = invert(teacher, count, job.imgsz_hw, steps=steps, seed=job.recipe.run.seed, skip=exist)
        for numbers, images_B3HW in batches:
            for number, image_3HW in zip(numbers, images_B3HW.cpu(), strict=True):
                pixels_HW3 = (image_3HW * 255).round().byte().permute(1, 2, 0).numpy()
                buffer = io.BytesIO()
                Image.fromarray(pixels_HW3.squeeze()).save(buffer, "PNG")
                atomic_write(files[number], buffer.getvalue())
            advance(len(numbers))
    shutil.copytree(folder, job.out / FOLDER)
    return tuple(_sample(file, job.imgsz_hw) for file in files)


def _sample(file: Path, size_hw: tuple[int, int]) -> Sample:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Sample(file, size_hw[1], size_hw[0], (), digest, f"{FOLDER}/{file.name}")
