"""Check the results of the stages from which the report draws its charts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import get_args

from yolo_compress.errors import RecipeError
from yolo_compress.evaluate.ab.comparison import SCHEMA as AB_SCHEMA
from yolo_compress.evaluate.ab.schema import AB
from yolo_compress.report.numbers import finite
from yolo_compress.report.schema import (
    BenchRow,
    Gammas,
    Measure,
    Quantisation,
    QuantisationFile,
    SensitiveGroup,
    Sensitivity,
    SensitivityFile,
)

MEASURES = get_args(Measure)
SENSITIVITY_KEYS = tuple(SensitivityFile.__annotations__)
QUANTISATION_KEYS = ("measure", "float", "int8", "worst", "then", "left", "images", "groups", "price", "compute_gflops")
MOST_SENSITIVE = 5


def gammas(given: Gammas | None) -> Gammas | None:
    """Check and return the histograms of BatchNorm gammas. None: there are none."""
    if not given or not given["epochs"]:
        return None
    bins = len(given["edges"]) - 1
    for epoch, counts in enumerate(given["epochs"]):
        if len(counts) != bins:
            raise RecipeError(f"gamma histogram of epoch {epoch} has {len(counts)} counts, expected {bins} (edges - 1)")
    return given


def pairs(what: str, given: Mapping[str, Sequence[int]] | None) -> dict[str, list[int]] | None:
    """Check and return layer -> [number before pruning, number after]. `what` is the name of the numbers: channels or MACs."""
    if not given:
        return None
    for layer, pair in given.items():
        if len(pair) != 2 or not 0 <= pair[1] <= pair[0]:
            raise RecipeError(f"{what} of {layer} are {list(pair)}, expected [before, after], after being the smaller")
    return {layer: [int(pair[0]), int(pair[1])] for layer, pair in given.items()}


def recovery(given: Sequence[Sequence[float]] | None) -> list[list[float | None]] | None:
    """Check and return the pairs (epoch, mAP50-95) of fine-tuning. None: there are none."""
    if not given:
        return None
    epochs = [-1.0, *(point[0] for point in given)]
    for before, point in zip(epochs, given, strict=False):
        if len(point) != 2 or point[0] <= before:
            raise RecipeError(f"recovery has {list(point)} after epoch {before:g}, expected [later epoch, mAP50-95]")
    return [list(point) for point in given]


def sensitivity(given: SensitivityFile | None) -> Sensitivity | None:
    """Check the sensitivity to pruning, and add `most_sensitive`: the groups with the worst `mean_change`."""
    if not given:
        return None
    if absent := [key for key in SENSITIVITY_KEYS if key not in given]:
        raise RecipeError(f"sensitivity lacks {', '.join(absent)}")
    if given["measure"] not in MEASURES:
        raise RecipeError(f"sensitivity is of {given['measure']!r}, expected one of {', '.join(MEASURES)}")
    if finite(given["dense"]) is None:
        raise RecipeError(
            f"sensitivity: the model before pruning has {given['measure']} {given['dense']}, expected a number"
        )
    ratios = list(given["ratios"])
    if not ratios or ratios != sorted(set(ratios)) or not 0 < ratios[0] <= ratios[-1] < 1:
        raise RecipeError(f"sensitivity has ratios {ratios}, expected shares between 0 and 1, ascending")
    for group, values in given["groups"].items():
        if len(values) != len(ratios):
            raise RecipeError(f"sensitivity of {group} has {len(values)} values, expected {len(ratios)}, one a ratio")
    for group, cap in given["caps"].items():
        if group not in given["groups"]:
            raise RecipeError(f"sensitivity caps {group}, which was not measured")
        if cap is not None and not 0 <= cap <= 1:
            raise RecipeError(f"sensitivity caps {group} at {cap}, expected a share of its channels, 0 to 1")
    return {**given, "most_sensitive": _most_sensitive(given)} if given["groups"] else None


def harm(measure: Measure, change: float | None) -> float:
    """Return how much worse a measure became: the rise of the loss, or the fall of mAP.

    If `change` is None, return infinity.
    """
    if change is None:
        return math.inf
    return change if measure == "loss" else -change


def _most_sensitive(given: SensitivityFile) -> list[SensitiveGroup]:
    mean: dict[str, float | None] = {}
    for group, values in given["groups"].items():
        known = [value for value in map(finite, values) if value is not None]
        mean[group] = sum(known) / len(known) - given["dense"] if len(known) == len(values) else None
    harms = {group: harm(given["measure"], change) for group, change in mean.items()}
    ranking = sorted((group for group in harms if harms[group] > 0), key=harms.__getitem__, reverse=True)
    return [{"group": group, "mean_change": mean[group]} for group in ranking[:MOST_SENSITIVE]]


def ab(given: AB | None, image_set: str | None) -> AB | None:
    """Check and return the result of the A/B comparison: its schema, and that it used the images of the report."""
    if not given:
        return None
    if given["schema"] != AB_SCHEMA:
        raise RecipeError(f"the A/B document has schema {given['schema']}, expected {AB_SCHEMA}")
    if image_set and given["image_set"] != image_set:
        raise RecipeError(f"A/B was measured over image set {given['image_set']}, the rows over {image_set}")
    return given


def quantiles(given: Mapping[str, Sequence[float]] | None, rows: Sequence[BenchRow]) -> dict[str, list[float]] | None:
    """Check and return, by row id, the latencies in ms at the quantiles 0, 1, ..., 100 % of the timed calls."""
    if not given:
        return None
    known = {row["id"] for row in rows}
    for name, values in given.items():
        if name not in known:
            raise RecipeError(f"latencies of {name}, which is no bench row")
        if len(values) != 101 or list(values) != sorted(values):
            raise RecipeError(f"latency quantiles of {name}: {len(values)} values, expected 101 that do not fall")
    return {name: list(values) for name, values in given.items()}


def quantisation(given: QuantisationFile | None) -> Quantisation | None:
    """Check the sensitivity to INT8, and add `gives_back`: for each group, the gain if only this group is in float.

    A gain above 0 means that float improves the measure.
    """
    if not given or not given["groups"]:
        return None
    required = QUANTISATION_KEYS if given.get("price", "gflops") == "gflops" else (*QUANTISATION_KEYS, "price_ms")
    if absent := [key for key in required if key not in given]:
        raise RecipeError(f"the sensitivity to INT8 lacks {', '.join(absent)}")
    if given["measure"] not in MEASURES:
        raise RecipeError(f"the sensitivity to INT8 is of {given['measure']!r}, expected one of {', '.join(MEASURES)}")
    gain = {group: harm(given["measure"], given["int8"] - value) for group, value in given["groups"].items()}
    return {**given, "gives_back": gain}
