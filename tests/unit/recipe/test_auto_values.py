"""Values for `auto` by the number of images: equal to Ultralytics' where the help says so, and no `auto` remains."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn
from ultralytics.models.yolo.detect import DetectionTrainer

from yolo_compress.data.samples import Sample
from yolo_compress.errors import RecipeError
from yolo_compress.recipe import auto_values, recipe
from yolo_compress.train import checkpoint

CUSTOM = [("data.yaml", "d.yaml"), ("baseline.pretrained", "n.pt")]


@cache
def model() -> nn.Module:
    return checkpoint.new_model("yolov8n.yaml", ["x"], 3, seed=0)


def ultralytics_choice(classes: int, iterations: int) -> tuple[str, float]:
    """Optimizer and learning rate that Ultralytics chooses with `optimizer=auto`."""
    trainer = SimpleNamespace(data={"nc": classes}, args=SimpleNamespace(lr0=0.01))
    DetectionTrainer.build_optimizer(trainer, model(), "auto", iterations=iterations)
    return trainer.args.optimizer, trainer.args.lr0


@pytest.mark.parametrize("classes", [1, 3, 80, 300])
@pytest.mark.parametrize(("images", "epochs"), [(70, 100), (6_400, 100), (6_401, 100), (118_287, 20)])
def test_optimizer_and_rate_are_those_of_ultralytics(classes: int, images: int, epochs: int) -> None:
    optimizer = auto_values.optimizer(images, epochs).value
    assert (optimizer, auto_values.lr0(optimizer, classes).value) == ultralytics_choice(
        classes, -(-images // 64) * epochs
    )


def test_epochs_fall_with_the_fourth_root_of_the_images() -> None:
    assert [auto_values.epochs("baseline", n).value for n in (1, 100, 1_600, 118_287)] == [100, 100, 50, 20]
    assert [auto_values.epochs("prune", n).value for n in (70, 205, 1_260, 100_000)] == [70, 59, 37, 20]
    for stage in auto_values.EPOCHS:
        found = [auto_values.epochs(stage, n).value for n in range(1, 200_000, 997)]
        assert found == sorted(found, reverse=True) and min(found) >= 1


@pytest.mark.parametrize("images", [1, 70, 205, 1_260, 20_000, 118_287])
def test_every_auto_becomes_a_valid_number(images: int) -> None:
    chosen = auto_values.resolve(recipe.load("custom", CUSTOM), images, 3)
    assert "auto" not in chosen.dump().replace("runtimes: auto", "")
    for stage in ("baseline", "prune", "distill", "qat"):
        section = getattr(chosen, stage)
        assert section.close_mosaic < section.epochs and section.epochs >= 1 and section.batch in (8, 16, 32)
    assert auto_values.resolve(chosen, 7, 7) == chosen


def test_given_values_stay() -> None:
    given = [("baseline.epochs", "3"), ("baseline.lr0", "0.004"), ("baseline.optimizer", "SGD"), ("prune.batch", "5")]
    chosen = auto_values.resolve(recipe.load("custom", [*CUSTOM, *given]), 1000, 3)
    assert (chosen.baseline.epochs, chosen.baseline.lr0, chosen.baseline.optimizer) == (3, 0.004, "SGD")
    assert chosen.prune is not None and (chosen.prune.batch, chosen.prune.epochs) == (5, 39)
    assert (
        auto_values.resolve(recipe.load("custom", [*CUSTOM, ("baseline.optimizer", "SGD")]), 9, 3).baseline.lr0 == 0.01
    )


def test_values_that_replace_auto_are_checked_together() -> None:
    chosen = recipe.load("custom", [*CUSTOM, ("distill.off_without_mosaic", "true"), ("distill.close_mosaic", "9")])
    assert auto_values.resolve(chosen, 100, 3).distill is not None
    with pytest.raises(RecipeError, match="recipe custom: distill.off_without_mosaic=true trains the last"):
        auto_values.resolve(chosen, 100_000, 3)
    with pytest.raises(RecipeError, match=r"prune\.epochs=20 is less than prune\.rounds=21"):
        auto_values.resolve(recipe.load("custom", [*CUSTOM, ("prune.rounds", "21")]), 100_000, 3)


@dataclass(frozen=True)
class Case:
    size: tuple[int, int]
    share: float  # side of an object divided by the side of the image
    smallest: int
    expected: int
    why: str


@pytest.mark.parametrize(
    "case",
    [
        Case((640, 640), 0.5, 320, 320, "smaller than 160 px"),
        Case((640, 640), 0.05, 320, 320, "smaller than 16 px"),
        Case((1920, 1920), 0.02, 320, 800, "smaller than 16 px"),
        Case((200, 200), 0.3, 320, 224, "images are not larger"),
        Case((6000, 6000), 0.002, 640, 1280, "consider tiles"),
        Case((20, 20), 0.5, 320, 32, "images are not larger"),
    ],
)
def test_input_size_suits_small_objects_and_enlarges_no_image(case: Case) -> None:
    boxes = ((0, 0.5, 0.5, case.share, case.share),) * 5
    choice = auto_values.imgsz([Sample(Path("a.jpg"), *case.size, boxes, "")], case.smallest)
    assert choice.value == case.expected and case.why in choice.why


def test_the_values_that_replace_auto_are_in_one_line() -> None:
    asked = recipe.load("custom", [*CUSTOM, ("prune.batch", "5")])
    text = auto_values.said(asked, resolved := auto_values.resolve(asked, 1000, 3))
    assert text is not None and text.startswith("auto: baseline epochs=56 batch=16 optimizer=AdamW")
    assert "; prune epochs=39 close_mosaic=7; distill" in text
    assert auto_values.said(resolved, resolved) is None


def test_the_gate_is_lower_with_few_validation_images() -> None:
    assert [auto_values.min_retention(n).value for n in (1, 49, 50, 87, 5000)] == [0.95, 0.95, 0.98, 0.98, 0.98]
    assert "on 87 validation images equally good models differ by about 1 %" in auto_values.min_retention(87).why
    assert "about 2 %: 0.98 would judge chance" in auto_values.min_retention(20).why
