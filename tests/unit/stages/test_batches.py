"""A batch of one image at one pixel in the deepest layer: refused before training, and never formed in calibration."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from tests.support.quant_net import net
from yolo_compress import preflight
from yolo_compress.errors import RecipeError
from yolo_compress.recipe.recipe import load
from yolo_compress.stages._calibration_images import letterboxed


def check(train: int, stage: str = "prune", unlabelled: int = 0, **knobs: str) -> None:
    words = [
        (key.replace("__", "."), value) for key, value in {"data__imgsz": "32", "prune__batch": "8", **knobs}.items()
    ]
    dataset: Any = SimpleNamespace(train=[None] * train, unlabelled=[None] * unlabelled)
    preflight._check_batches(load("digits", words), dataset, [stage])


def test_torch_cannot_train_on_it() -> None:
    model = net().train()
    model(torch.rand(2, 3, 32, 32))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(torch.rand(1, 3, 32, 32))


@pytest.mark.fault(79)
@pytest.mark.parametrize("train", [1, 9, 17])
def test_a_lone_last_image_is_refused_before_training(train: int) -> None:
    with pytest.raises(
        RecipeError, match=rf"prune\.batch=8: {train} training images leave one alone in the last batch"
    ):
        check(train)
    check(train, data__imgsz="64")
    check(train, prune__epochs="0")
    check(train, "bench")


@pytest.mark.parametrize("train", [2, 8, 10, 16])
def test_two_in_the_last_batch_are_enough(train: int) -> None:
    check(train)


def test_distillation_counts_the_images_that_it_trains_on() -> None:
    with pytest.raises(RecipeError, match="distill.batch=8: 9 training images"):
        check(16, "distill", distill__batch="8", distill__images="more", unlabelled=9, distill__alpha="0.5")
    check(9, "distill", distill__batch="8", distill__images="more", unlabelled=16)
    with pytest.raises(RecipeError, match="distill.batch=8: 25 training images"):
        check(16, "distill", distill__batch="8", distill__data_free="25")


@pytest.mark.parametrize(("count", "sizes"), [(1, [1]), (16, [16]), (17, [17]), (33, [16, 17]), (34, [16, 16, 2])])
def test_calibration_takes_each_image_once_and_none_alone(tmp_path: Path, count: int, sizes: list[int]) -> None:
    samples: list[Any] = []
    for index in range(count):
        image = Image.new("RGB", (16, 16), (index, 0, 0))
        image.putpixel((0, 0), (0, 255, 0))
        image.save(tmp_path / f"{index}.png")
        samples.append(SimpleNamespace(image=tmp_path / f"{index}.png"))
    parts = list(letterboxed(samples, (32, 32)))
    assert [len(part) for part in parts] == sizes
    assert (torch.cat(parts)[:, 0, 16, 16] * 255).round().tolist() == list(range(count))
