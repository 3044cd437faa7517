"""The levels of a trial, from cheap to dear, and when a trial ends early. Pure functions on recipes and figures.

    cut      prune without training; the engine of these widths is timed, since latency depends on widths and not on weights
    short    fine-tuning over a fraction of the epochs
    full     fine-tuning over all epochs
    engine   one engine for each precision, and for each `search.int8_max_drop`, all of the model of `full`

A level is a recipe and the stage to run it to. Each level is written to a file and read again by the process that runs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from typing_extensions import TypedDict

from yolo_compress.recipe.recipe import (
    BenchConfig,
    EngineConfig,
    ExportConfig,
    QatConfig,
    Recipe,
    ReportConfig,
    SearchConfig,
)
from yolo_compress.recipe.sections import Section
from yolo_compress.search.front import Goal
from yolo_compress.search.space import WEIGHTS, Point, int8_drops

CUT, SHORT, FULL = "cut", "short", "full"
# Before training, differences are large and say little: of two criteria, one was 0.07 of the baseline's mAP better after the cut and
# 0.008 after fine-tuning (BCCD, benchmarks/RESULTS.md). So after `cut`, only a difference above this ends a trial.
MARGIN_AFTER_CUT = 0.1
TOLERANCE = 0.02  # two timings of one engine differ by about this; a trial above the limit by more ends after `cut`


class Figures(TypedDict):
    """What a level of a trial measured."""

    retention: float  # mAP50-95 divided by that of the baseline
    low: float | None  # ends of its 95 % interval; null if too few images have objects
    high: float | None
    cost: float  # ms or MiB: the lowest of the engines that `cut` built


@dataclass(frozen=True)
class Level:
    """A recipe, and the last stage that has to run. `engines` are the precisions of the engines to measure; empty: none is built."""

    name: str
    recipe: Recipe
    target: str
    engines: tuple[str, ...] = ()


def levels(base: Recipe, point: Point) -> list[Level]:
    """Return the levels of a trial up to the fully trained model, in the order in which they run.

    Args:
        base: Recipe of the study, without `auto`.
        point: The trial's values.
    """
    search = _search(base)
    found = [Level(CUT, _cut(base, point, search), "engine", search.precision)]
    full = _trained(base, point, 1.0)
    short = _trained(base, point, search.short)
    if short != full:
        found.append(Level(SHORT, short, "distill"))
    return [*found, Level(FULL, full, "distill")]


def placements(base: Recipe, point: Point) -> list[Level]:
    """Return the engines of a trial, which all have the model of level `full`. The name of a level is that of its placement.

    A placement is a precision, such as "int8"; or "int8-0.01", an INT8 engine with groups in float by `qat.max_drop=0.01`.
    """
    search, full = _search(base), _trained(base, point, 1.0)
    found = []
    for precision in search.precision:
        qat = full.qat if precision == "int8" else None
        found.append(Level(precision, _with_engine(full, (precision,), search, qat), "engine", (precision,)))
    for drop in int8_drops(base, search) if "int8" in search.precision else ():
        assert full.qat is not None
        qat = full.qat.model_copy(update={"sensitivity": "loss", "max_drop": drop})
        if qat != full.qat:
            found.append(Level(f"int8-{drop:g}", _with_engine(full, ("int8",), search, qat), "engine", ("int8",)))
    return found


def dense(base: Recipe) -> Level:
    """Return the recipe of the unpruned baseline's engines: the reference of the search."""
    search = _search(base)
    whole = base.replaced({"prune": None, "distill": None, "sparsify": None, "teacher": None, **_MEASURED_HERE})
    qat = _calibrated(base.qat)
    return Level("dense", _with_engine(whole, search.precision, search, qat), "engine", search.precision)


def shared(base: Recipe) -> Recipe:
    """Return the recipe of the stages before `prune`, which all trials share."""
    return base.replaced(_MEASURED_HERE)


def chosen(base: Recipe, point: Point, placement: str) -> Recipe:
    """Return the whole recipe of a point and placement, with the sections of `base` from `export` on: the result of a search."""
    (level,) = [one for one in placements(base, point) if one.name == placement]
    found = base.replaced({"prune": level.recipe.prune, "distill": level.recipe.distill, "search": None})
    return _whole(found, level.engines[0], level.recipe.qat or base.qat)


def unpruned(base: Recipe, placement: str) -> Recipe:
    """Return the whole recipe of the baseline without pruning, in one precision: the result if it meets the goal already."""
    found = base.replaced(
        {"prune": None, "distill": None, "sparsify": None, "teacher": None, "control": None, "search": None}
    )
    return _whole(found, placement, _calibrated(base.qat) if placement == "int8" else None)


def _whole(recipe: Recipe, precision: str, qat: QatConfig | None) -> Recipe:
    """Return the recipe up to the report, with files of this precision. Sections that it lacks get defaults."""
    export = recipe.export or ExportConfig()
    if precision not in export.precisions:
        export = export.model_copy(update={"precisions": (*export.precisions, precision)})
    last = {
        "engine": recipe.engine or EngineConfig(),
        "bench": recipe.bench or BenchConfig(),
        "report": recipe.report or ReportConfig(),
    }
    return recipe.replaced({"qat": qat, "export": export, **last})


def ends(level: str, own: Figures, others: Iterable[Figures], goal: Goal) -> str | None:
    """Decide whether a trial ends after a level. Return the reason as text, or None if the trial goes on.

    A trial ends after `cut` if its engine is above the limit. It ends after any level if another trial is no more expensive and its
    retention is above the whole interval of this trial; after `cut`, above it by `MARGIN_AFTER_CUT`. All costs below the limit count
    as equal: nobody asked for less.

    Args:
        level: Level that the trial has finished.
        own: Figures of the trial at this level.
        others: Figures of the other trials at the same level.
        goal: Goal of the search.
    """
    if level == CUT and goal.limit is not None and own["cost"] > goal.limit * (1 + TOLERANCE):
        return f"{goal.text(own['cost'])} is above the limit of {goal.text(goal.limit)}"
    best = own["high"] if own["high"] is not None else own["retention"]
    floor, margin = goal.limit or 0.0, MARGIN_AFTER_CUT if level == CUT else 0.0
    for other in others:
        if max(other["cost"], floor) <= max(own["cost"], floor) and other["retention"] > best + margin:
            return (
                f"after {level} it keeps {own['retention']:.1%} of mAP50-95 (at most {best:.1%}), another trial that is no more "
                f"expensive keeps {other['retention']:.1%}"
            )
    return None


_MEASURED_HERE: Mapping[str, Section | None] = {"control": None, "bench": None, "report": None, "search": None}


def _search(base: Recipe) -> SearchConfig:
    assert base.search is not None
    return base.search


def _cut(base: Recipe, point: Point, search: SearchConfig) -> Recipe:
    pruned = _trained(base, point, 1.0)
    assert pruned.prune is not None
    changed: dict[str, Section | None] = {"prune": pruned.prune.model_copy(update={"epochs": 0}), "distill": None}
    cut = pruned.replaced(changed)
    return _with_engine(cut, search.precision, search, _calibrated(base.qat))


def _trained(base: Recipe, point: Point, share: float) -> Recipe:
    """Return the recipe of a point with `share` of its epochs, up to distillation."""
    assert base.prune is not None
    prune: Point = {name: point[name] for name in ("keep_flops", "criterion", "round_to") if name in point}
    epochs = _epochs(base, point, share)
    sections: dict[str, Section | None] = dict(_MEASURED_HERE)
    sections["prune"] = base.prune.model_copy(update={**prune, **_schedule(base.prune, epochs["prune"])})
    if base.distill is not None:
        weights = {name: point[name] for name in WEIGHTS if name in point}
        sections["distill"] = base.distill.model_copy(update={**weights, **_schedule(base.distill, epochs["distill"])})
    return base.replaced(sections)


def _epochs(base: Recipe, point: Point, share: float) -> dict[str, int]:
    """Return the epochs of `prune` and `distill`. Together they have `share` of the recipe's epochs."""
    assert base.prune is not None
    prune, distill = int(base.prune.epochs), int(base.distill.epochs) if base.distill else 0
    total = prune + distill
    if "prune_share" in point and total > 1:
        prune = min(max(round(total * float(point["prune_share"])), 1), total - 1)
    least = base.prune.rounds
    shorter = {"prune": max(round(prune * share), least) if prune else 0}
    return shorter | ({"distill": max(round((total - prune) * share), 1)} if base.distill else {})


def _schedule(section: Section, epochs: int) -> dict[str, int]:
    """Return epochs, and epochs without mosaic: the same share of the epochs as in the section."""
    before, last = int(getattr(section, "epochs")), int(getattr(section, "close_mosaic"))  # noqa: B009  # any section that trains
    return {
        "epochs": epochs,
        "close_mosaic": last if epochs == before else min(epochs, round(last * epochs / max(before, 1))),
    }


def _calibrated(qat: QatConfig | None) -> QatConfig | None:
    """Return the section `qat` with calibration only."""
    off = {name: QatConfig.model_fields[name].default for name in ("sensitivity", "max_drop", "sensitivity_price")}
    return qat.model_copy(update={"epochs": 0, "learned_scales": False, **off}) if qat is not None else None


def _with_engine(recipe: Recipe, precisions: tuple[str, ...], search: SearchConfig, qat: QatConfig | None) -> Recipe:
    """Return the recipe with engines of these precisions. FP32 files are always there: INT8 engines are compared with them."""
    export = (recipe.export or ExportConfig()).model_copy(
        update={
            "precisions": tuple(dict.fromkeys(("fp32", *precisions))),
            "torchscript": False,
            "nms": False,
            "calibration_cache": False,
        }
    )
    engine = (recipe.engine or EngineConfig()).model_copy(update={"runtimes": (search.runtime,)})
    return recipe.replaced({"qat": qat if "int8" in precisions else None, "export": export, "engine": engine})
