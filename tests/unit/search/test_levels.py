"""The levels of a trial: their recipes, and when a trial ends early."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.search.test_space import digits
from yolo_compress.recipe import recipe
from yolo_compress.search.front import Goal
from yolo_compress.search.levels import Figures, chosen, dense, ends, levels, placements, unpruned
from yolo_compress.search.space import Point

POINT: Point = {"keep_flops": 0.4, "criterion": "taylor", "round_to": 16, "prune_share": 0.75, "box_weight": 2.0}
GOAL = Goal("latency", "onnxruntime", 4.0, 0.01)


def test_levels_go_from_cheap_to_dear() -> None:
    cut, short, full = levels(digits(), POINT)
    assert [(one.name, one.target) for one in (cut, short, full)] == [
        ("cut", "engine"),
        ("short", "distill"),
        ("full", "distill"),
    ]
    assert cut.recipe.prune and cut.recipe.prune.epochs == 0 and cut.recipe.distill is None
    assert (
        cut.recipe.qat
        and cut.recipe.qat.epochs == 0
        and cut.recipe.engine
        and cut.recipe.engine.runtimes == ("onnxruntime",)
    )
    for one in (cut, short, full):
        prune = one.recipe.prune
        assert prune and (prune.keep_flops, prune.criterion, prune.round_to) == (0.4, "taylor", 16)
        assert one.recipe.search is one.recipe.report is one.recipe.bench is None


def test_the_epochs_are_split_and_their_sum_stays() -> None:
    _, short, full = (one.recipe for one in levels(digits(), POINT))  # the recipe has 10 + 6
    assert full.prune and full.distill and (full.prune.epochs, full.distill.epochs) == (12, 4)
    assert short.prune and short.distill and (short.prune.epochs, short.distill.epochs) == (3, 1)
    assert full.distill.box_weight == 2.0 and full.distill.logit_weight == 1.0
    assert full.prune.close_mosaic == round(3 * 12 / 10)


def test_one_epoch_has_no_short_level() -> None:
    base = digits(("prune.epochs", "1"), ("distill.epochs", "1"))
    assert [one.name for one in levels(base, POINT)] == ["cut", "full"]


def test_engines_share_the_full_model() -> None:
    base = digits(("search.precision", "fp16,int8"), ("search.int8_max_drop", "0.003,0.02"))
    full, found = levels(base, POINT)[-1].recipe, placements(base, POINT)
    assert [one.name for one in found] == ["fp16", "int8", "int8-0.003", "int8-0.02"]
    assert all((one.recipe.prune, one.recipe.distill) == (full.prune, full.distill) for one in found)
    assert found[0].recipe.qat is None and found[1].recipe.qat == base.qat
    assert [(one.recipe.qat.sensitivity, one.recipe.qat.max_drop) for one in found[2:] if one.recipe.qat] == [
        ("loss", 0.003), ("loss", 0.02),
    ]  # fmt: skip
    assert all(one.recipe.export and one.recipe.export.precisions[0] == "fp32" for one in found), (
        "INT8 is compared with it"
    )


def test_the_reference_is_the_unpruned_baseline() -> None:
    found = dense(digits())
    assert found.recipe.prune is found.recipe.distill is found.recipe.sparsify is None and found.target == "engine"
    assert found.recipe.baseline == digits().baseline


@pytest.mark.parametrize("level", [0, 1, 2, 3, 4])
def test_a_recipe_survives_its_file(tmp_path: Path, level: int) -> None:
    """A trial's process gets files, so a file must be the whole recipe."""
    found = [*levels(digits(), POINT), *placements(digits(), POINT)][level].recipe
    file = tmp_path / "x.yaml"
    file.write_text(found.dump())
    assert recipe.load(file).replaced({}) == found.model_copy(update={"name": "x"})


def test_the_chosen_recipe_has_the_trials_model_and_the_own_rest() -> None:
    base = digits(("export.precisions", "fp32"), ("qat.epochs", "2"))
    found = chosen(base, POINT, "int8-0.01")
    last = placements(base, POINT)[-1].recipe
    assert (found.prune, found.distill, found.qat) == (last.prune, last.distill, last.qat)
    assert found.export and found.export.precisions == ("fp32", "int8") and found.export.torchscript
    assert found.report == base.report and found.bench == base.bench and found.search is None
    plain = unpruned(base, "fp16")
    assert plain.prune is plain.distill is plain.qat is None and plain.report == base.report


def figures(retention: float, cost: float, width: float = 0.02) -> Figures:
    return {"retention": retention, "low": retention - width, "high": retention + width, "cost": cost}


@pytest.mark.parametrize(
    ("level", "own", "other", "ended"),
    [
        ("cut", figures(0.6, 4.2), None, True),  # above the limit of 4 ms
        ("cut", figures(0.6, 4.05), None, False),  # within what two timings differ by
        ("full", figures(0.6, 4.2), None, False),  # only `cut` measures the cost
        ("short", figures(0.90, 3.0), figures(0.93, 3.9), True),  # within the limit all costs are equal
        ("short", figures(0.92, 3.0), figures(0.93, 2.0), False),  # within its interval
        ("short", figures(0.90, 4.0), figures(0.99, 4.5), False),  # the other one is more expensive
        ("cut", figures(0.60, 3.0), figures(0.70, 3.0), False),  # before training, 0.1 says little
        ("cut", figures(0.60, 3.0), figures(0.75, 3.0), True),
    ],
)
def test_a_trial_ends_where_another_is_better(level: str, own: Figures, other: Figures | None, ended: bool) -> None:
    assert bool(ends(level, own, [other] if other else [], GOAL)) == ended


def test_without_a_limit_a_cheaper_trial_goes_on() -> None:
    goal = Goal("latency", "onnxruntime", None, 0.01)
    assert ends("full", figures(0.8, 2.0), [figures(0.95, 3.0)], goal) is None
    assert "keeps 95.0%" in str(ends("full", figures(0.8, 3.0), [figures(0.95, 3.0)], goal))
