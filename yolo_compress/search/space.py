"""The space of a search: which knobs a trial may set, and to which values. Pure functions on a recipe and a number of images.

A point of the space is a dictionary: name of a knob of the section `search` -> value. `levels.py` makes recipes from a point.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from yolo_compress.recipe.auto_values import LARGE_SET, SMALL_SET
from yolo_compress.recipe.recipe import Recipe, SearchConfig
from yolo_compress.runtime.registry import RUNTIMES

Value = float | int | str
Point = dict[str, Value]

# Defaults for `auto`. The fewer images, the less a fine-tuning recovers, so less is cut (docs/search.md).
KEEP_FLOPS = {"small": (0.4, 0.85), "medium": (0.3, 0.8), "large": (0.2, 0.8)}
PRUNE_SHARE = (0.5, 0.9)
# A factor of about 2 to 3 around the defaults. With few images, the difference that such a weight makes is within the interval of the
# mAP, so these knobs would only take trials from the others.
WEIGHTS = {"logit_weight": (0.5, 2.0), "feature_weight": (0.1, 1.0), "box_weight": (0.5, 3.0)}
INT8_MAX_DROP = (0.01,)
ROUND_TO_CPU, ROUND_TO_GPU = (8, 16), (16, 32)  # AVX2 and AVX-512; Tensor Cores in FP16 and INT8


@dataclass(frozen=True)
class Axis:
    """Values of one knob.

    Attributes:
        choices: The values. Empty: all numbers from `low` to `high`.
        low, high: Smallest and largest value of a range.
        log: Whether a range is searched by its logarithm, as weights of losses are.
    """

    choices: tuple[Value, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False

    @property
    def fixed(self) -> bool:
        """Whether there is only one value, so that there is nothing to search."""
        return len(self.choices) == 1 or (not self.choices and self.low == self.high)

    def nearest(self, value: Value) -> Value:
        """Return the value of the axis that is nearest to `value`: the value itself if it is on the axis."""
        if not self.choices:
            return min(max(float(value), self.low), self.high)
        if value in self.choices or isinstance(value, str):
            return value if value in self.choices else self.choices[0]
        numbers = [choice for choice in self.choices if not isinstance(choice, str)]
        return min(numbers, key=lambda choice: abs(choice - value))

    def text(self) -> str:
        """Return the axis as text: "0.3 to 0.8", or "8, 16"."""
        return ", ".join(map(str, self.choices)) if self.choices else f"{self.low:g} to {self.high:g}"


def axes(recipe: Recipe, images: int) -> dict[str, Axis]:
    """Return the axes of a recipe's search: name of a knob of `search` -> its values. A knob that is not searched has no axis.

    Args:
        recipe: Recipe with a section `search`, without `auto` in other sections.
        images: Number of training images, which decides the ranges that are `auto`.
    """
    search = recipe.search
    assert search is not None and recipe.prune is not None
    size = "small" if images < SMALL_SET else "medium" if images < LARGE_SET else "large"
    found: dict[str, Axis | None] = {
        "keep_flops": _range(search.keep_flops, KEEP_FLOPS[size]),
        "criterion": _choice(search.criterion, _criteria(recipe)),
        "round_to": _choice(search.round_to, ROUND_TO_GPU if RUNTIMES[search.runtime].gpu else ROUND_TO_CPU),
    }
    distill = recipe.distill
    if distill is not None:
        found["prune_share"] = _range(search.prune_share, PRUNE_SHARE if distill.labelled else None)
        for knob, default in WEIGHTS.items():
            idle = knob in distill.idle(distill.teacher) or not getattr(distill, knob)
            found[knob] = _range(getattr(search, knob), None if size == "small" or idle else default, log=True)
    return {name: axis for name, axis in found.items() if axis is not None}


def own_point(recipe: Recipe, space: Mapping[str, Axis]) -> Point:
    """Return the point of the recipe's own values. A value outside its axis is moved to the nearest one on it."""
    assert recipe.prune is not None
    values: dict[str, Value] = {
        "keep_flops": recipe.prune.budget[1],
        "criterion": recipe.prune.criterion,
        "round_to": recipe.prune.round_to,
    }
    if recipe.distill is not None:
        prune, distill = int(recipe.prune.epochs), int(recipe.distill.epochs)
        values["prune_share"] = prune / max(1, prune + distill)
        values |= {knob: getattr(recipe.distill, knob) for knob in WEIGHTS}
    return {name: axis.nearest(values[name]) for name, axis in space.items()}


def point_text(point: Point) -> str:
    """Return a point as text: "keep_flops=0.41 criterion=obs"."""
    return " ".join(
        f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}" for name, value in point.items()
    )


def int8_drops(recipe: Recipe, search: SearchConfig) -> tuple[float, ...]:
    """Return the values of `qat.max_drop` of a trial's INT8 engines, beside the engine with all groups in INT8."""
    if search.int8_max_drop == "auto":
        return INT8_MAX_DROP if recipe.qat is not None and "int8" in search.precision else ()
    return search.int8_max_drop or ()


def _criteria(recipe: Recipe) -> tuple[str, ...]:
    """Return the criteria for `auto`: the recipe's own, the default, and the one that lost least mAP (benchmarks/RESULTS.md)."""
    assert recipe.prune is not None
    sparse = ("bn_gamma",) if recipe.sparsify is not None else ()
    return tuple(dict.fromkeys((recipe.prune.criterion, "obs", "taylor", *sparse)))


def _range(value: object, default: tuple[float, float] | None, log: bool = False) -> Axis | None:
    asked = default if value == "auto" else value
    return Axis(low=asked[0], high=asked[1], log=log) if isinstance(asked, tuple) else None


def _choice(value: object, default: tuple[Value, ...]) -> Axis | None:
    asked = default if value == "auto" else value
    return Axis(choices=asked) if isinstance(asked, tuple) else None
