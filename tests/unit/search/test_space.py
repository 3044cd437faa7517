"""The space: which knobs a study of a recipe varies, by the recipe and the number of images."""

from __future__ import annotations

import pytest

from yolo_compress.recipe import recipe
from yolo_compress.recipe.recipe import Recipe
from yolo_compress.search.space import Axis, axes, int8_drops, own_point


def digits(*overrides: tuple[str, str]) -> Recipe:
    """The recipe `digits`, which has no `auto`, with a section `search`."""
    return recipe.load("digits", [("search.trials", "12"), *overrides])


def test_the_ranges_follow_the_number_of_images() -> None:
    few, many = axes(digits(), 100), axes(digits(), 30_000)
    assert (few["keep_flops"].low, few["keep_flops"].high) == (0.4, 0.85)
    assert many["keep_flops"].low < few["keep_flops"].low
    assert set(few) == {"keep_flops", "criterion", "round_to", "prune_share"}
    assert set(many) == {*few, "logit_weight", "feature_weight", "box_weight"}
    assert many["box_weight"].log and not many["keep_flops"].log


def test_criteria_start_with_the_recipes_own() -> None:
    assert axes(digits(), 100)["criterion"].choices == ("bn_gamma", "obs", "taylor")
    assert axes(digits(("sparsify", "null"), ("prune.criterion", "lamp")), 100)["criterion"].choices == (
        "lamp",
        "obs",
        "taylor",
    )


def test_round_to_follows_the_runtime() -> None:
    assert axes(digits(), 100)["round_to"].choices == (8, 16)
    assert axes(digits(("search.runtime", "tensorrt")), 100)["round_to"].choices == (16, 32)


def test_null_is_not_searched_and_a_list_is_taken_as_it_is() -> None:
    found = axes(digits(("search.keep_flops", "null"), ("search.round_to", "8"), ("search.logit_weight", "0.5,2")), 100)
    assert "keep_flops" not in found and found["round_to"] == Axis(choices=(8,)) and found["round_to"].fixed
    assert found["logit_weight"] == Axis(low=0.5, high=2.0, log=True)


def test_without_distillation_its_knobs_have_no_axis() -> None:
    assert set(axes(digits(("distill", "null")), 30_000)) == {"keep_flops", "criterion", "round_to"}


def test_a_weight_of_0_stays_0() -> None:
    assert "box_weight" not in axes(digits(("distill.box_weight", "0")), 30_000)


def test_the_own_point_is_the_recipe() -> None:
    found = digits()
    assert own_point(found, axes(found, 30_000)) == {
        "keep_flops": 0.5, "criterion": "bn_gamma", "round_to": 8, "prune_share": 10 / 16, "logit_weight": 1.0,
        "feature_weight": 0.3, "box_weight": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("axis", "value", "nearest"),
    [
        (Axis(low=0.3, high=0.8), 0.9, 0.8),
        (Axis(low=0.3, high=0.8), 0.1, 0.3),
        (Axis(choices=(8, 16)), 32, 16),
        (Axis(choices=("obs", "taylor")), "lamp", "obs"),
        (Axis(choices=("obs", "taylor")), "taylor", "taylor"),
    ],
)
def test_a_value_outside_is_moved_to_the_nearest(axis: Axis, value: float | str, nearest: float | str) -> None:
    assert axis.nearest(value) == nearest


def test_float_groups_need_qat() -> None:
    def drops(*overrides: tuple[str, str]) -> tuple[float, ...]:
        found = digits(*overrides)
        assert found.search is not None
        return int8_drops(found, found.search)

    assert drops() == (0.01,) and drops(("search.int8_max_drop", "0.003,0.02")) == (0.003, 0.02)
    assert (
        drops(("search.int8_max_drop", "null")) == drops(("qat", "null")) == drops(("search.precision", "fp16")) == ()
    )
