"""Checks across sections: valid settings that cannot work together. They run before any work."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from .. import home
from ..runtime.registry import INT8_IMAGES, with_option
from .controls import possible
from .knob_types import number
from .messages import got
from .sections import ControlConfig, DistillConfig, PruneConfig, SearchConfig, Section, Sections, SourceConfig

SAME_NET = (
    "distill: teacher and student are the same model, so there is nothing to learn: "
    "give another teacher.weights, add a section prune, or set distill=null"
)

DISTILLED = ("logit_weight", "feature_weight", "box_weight")  # ranges of `search` that are knobs of `distill`
IN_CHAIN = re.compile(r"model\.\d+\.m(\.|=|$)")  # a bottleneck of the student, in a value of `distill.layers`

_MAKE = {
    "baseline": ("PRETRAINED", "STUDENT"),
    "teacher": ("TEACHER_PRETRAINED", "TEACHER"),
}  # variables of the Makefile


def contradictions(recipe: Sections) -> Iterator[str]:
    """Yield an error message for each combination of settings in the recipe that cannot work together."""
    for name, needed in (("engine", "export"), ("bench", "engine"), ("report", "bench")):
        if getattr(recipe, name) and not getattr(recipe, needed):
            yield f"{name} needs the section {needed}: add {needed}: {{}}, or leave {name} out too ({name}=null)"
    for name, source in (("baseline", recipe.baseline), ("teacher", recipe.teacher)):
        if source:
            yield from _check_source(name, source)
    if recipe.prune and recipe.prune.depth and recipe.distill:
        inside = [name for name in recipe.distill.layers or () if IN_CHAIN.match(name)]
        if inside:
            yield (
                f"distill.layers: prune.depth=true can remove {inside[0].partition('=')[0]} from the student: "
                "name a whole layer, such as model.15"
            )
    if recipe.distill:
        yield from _check_distill(recipe, recipe.distill)
    if recipe.prune:
        yield from _check_prune(recipe.prune)
    if recipe.control:
        yield from _check_control(recipe, recipe.control)
    if recipe.search:
        yield from _check_search(recipe, recipe.search)
    if recipe.export and recipe.export.dynamic_batch and recipe.export.batch != 1:
        yield f"export.batch={recipe.export.batch} has no effect with export.dynamic_batch=true: give one of the two"
    if recipe.export and recipe.export.nms and (recipe.export.batch != 1 or recipe.export.dynamic_batch):
        yield "export.nms needs a batch of 1: leave export.batch and export.dynamic_batch out"
    if recipe.engine and recipe.export and recipe.engine.int8_images:
        able = with_option(INT8_IMAGES)
        if recipe.engine.runtimes != "auto" and not set(able) & set(recipe.engine.runtimes):
            yield (
                f"engine.int8_images has no effect on {', '.join(recipe.engine.runtimes)}: add {' or '.join(able)} to "
                "engine.runtimes, or leave it out"
            )
        if "int8" not in recipe.export.precisions:
            yield "engine.int8_images has no effect without int8 in export.precisions: leave it out"
    if recipe.bench and recipe.bench.iterations < recipe.bench.rounds:
        yield (
            f"bench.iterations={recipe.bench.iterations} is less than bench.rounds={recipe.bench.rounds}: "
            "give each round at least one iteration"
        )
    for knob in ("max_drop", "sensitivity_price"):
        if recipe.qat and recipe.qat.sensitivity == "off" and getattr(recipe.qat, knob) != _default(recipe.qat, knob):
            yield f"qat.{knob} has no effect with qat.sensitivity=off: set qat.sensitivity=loss or map50_95"
    if recipe.qat and recipe.qat.learned_scales and not recipe.qat.epochs:
        yield "qat.learned_scales has no effect with qat.epochs=0: nothing is trained"
    for name, section in (("qat", recipe.qat), ("export", recipe.export)):
        if section and section.calibrator != "percentile" and section.percentile != _default(section, "percentile"):
            yield (
                f"{name}.percentile={section.percentile} has no effect with {name}.calibrator={section.calibrator}: "
                f"set {name}.calibrator=percentile, or leave {name}.percentile out"
            )


def _check_source(name: str, source: SourceConfig) -> Iterator[str]:
    given = [f"{name}.{knob}" for knob in source.ORIGINS if getattr(source, knob) is not None]
    if not given:
        yield (
            f"{name}: nothing to start from; give {name}.pretrained (a checkpoint of any classes, such as yolov8s.pt; with make: "
            f"{_MAKE[name][0]}=), {name}.weights (a trained detector of these classes; with make: {_MAKE[name][1]}=) or "
            f"{name}.model (an architecture, such as yolov8n.yaml or yolo11n.yaml, trained from random weights)"
        )
    if len(given) > 1:
        yield f"{' and '.join(given)} exclude each other: keep one, and set the others to null"
    for knob in ("detection_part", "freeze"):
        if source.pretrained is None and getattr(source, knob) != _default(source, knob):
            yield f"{name}.{knob} has no effect without {name}.pretrained: leave it out"


def _check_prune(prune: PruneConfig) -> Iterator[str]:
    budgets = [f"prune.{knob}" for knob in prune.BUDGETS if getattr(prune, knob) is not None]
    if len(budgets) > 1:
        yield f"{' and '.join(budgets)} are both given: keep one budget, and set the others to null"
    for knob in prune.idle(prune.kind):
        value = getattr(prune, knob)
        if value != _default(prune, knob):
            text = value if isinstance(value, str) else got(value)
            yield f"prune.{knob}={text} has no effect with prune.kind={prune.kind}: leave it out"
    if prune.kind == "unstructured" and prune.scope == "isomorphic":
        yield "prune.scope=isomorphic ranks channels; prune.kind=unstructured takes global or local"
    for knob in ("latency_runtime", "latency_precision", "latency_table"):
        if prune.latency_ms is None and getattr(prune, knob) != _default(prune, knob):
            yield f"prune.{knob} has no effect without prune.latency_ms: leave it out"
        elif prune.latency_table and knob != "latency_table" and getattr(prune, knob) != _default(prune, knob):
            yield f"prune.{knob} has no effect with prune.latency_table, which names its own runtime and precision: leave it out"
    if prune.depth and prune.sensitivity != "off":
        yield (
            f"prune.sensitivity={prune.sensitivity} limits the loss of channels, not of bottlenecks: "
            "set prune.sensitivity=off or prune.depth=false"
        )
    if (
        prune.then == "off"
        and prune.then_share != _default(prune, "then_share")
        and "then" not in prune.idle(prune.kind)
    ):
        yield f"prune.then_share={prune.then_share} has no effect with prune.then=off: leave it out"
    if prune.then == "low_rank" and prune.rounds > 1:
        yield f"prune.rounds={prune.rounds} does not work with prune.then=low_rank, which factorises once: set prune.rounds=1"
    if prune.epochs != "auto" and 0 < prune.epochs < prune.rounds:
        yield f"prune.epochs={prune.epochs} is less than prune.rounds={prune.rounds}: give each round at least one epoch"


def _check_control(recipe: Sections, control: ControlConfig) -> Iterator[str]:
    able = possible(recipe)
    if control.nets != "auto" and (idle := [net for net in control.nets if net not in able]):
        missing = {
            "longer": "a stage that trains with labels",
            "taught": "a teacher",
            "narrowed": "prune.kind=channel or low_rank",
        }
        yield f"control.nets: {idle[0]} needs {missing[idle[0]]}; this recipe can have {', '.join(able) or 'no control'}"


def _check_search(recipe: Sections, search: SearchConfig) -> Iterator[str]:
    prune = recipe.prune
    if prune is None:
        yield "search varies how much prune removes: add a section prune, or set search=null"
    elif prune.kind != "channel":
        yield f"search varies how many channels prune removes: set prune.kind=channel, not {prune.kind}"
    elif prune.budget[0] != "keep_flops":
        yield f"search sets the budget of prune by search.keep_flops: set prune.{prune.budget[0]}=null"
    for cost, limit in (("latency", "latency_ms"), ("size", "size_mib")):
        if search.cost != cost and getattr(search, limit) is not None:
            yield f"search.{limit} has no effect with search.cost={search.cost}: set search.cost={cost}, or leave it out"
    limits: dict[str, tuple[float, float]] = {"keep_flops": (0, 1), "prune_share": (0, 1)}
    for knob in ("keep_flops", "prune_share", "logit_weight", "feature_weight", "box_weight"):
        value, (least, most) = getattr(search, knob), limits.get(knob, (0, 1000))
        if isinstance(value, tuple) and not least < value[0] <= value[1] < most:
            yield f"search.{knob}={value[0]:g},{value[1]:g}: expected two numbers above {least:g} and below {most:g}"
    asked = [knob for knob in ("prune_share", *DISTILLED) if isinstance(getattr(search, knob), tuple)]
    if asked and recipe.distill is None:
        yield f"search.{asked[0]} has no effect without the section distill: leave it out"
    elif recipe.distill and (idle := [one for one in asked if one in recipe.distill.idle(recipe.distill.teacher)]):
        yield f"search.{idle[0]} has no effect with distill.teacher={recipe.distill.teacher}: leave it out"
    if isinstance(search.int8_max_drop, tuple) and (recipe.qat is None or "int8" not in search.precision):
        yield "search.int8_max_drop needs the section qat and search.precision with int8: leave it out"


def _check_distill(recipe: Sections, distill: DistillConfig) -> Iterator[str]:
    if (
        distill.teacher != "self"
        and not recipe.prune
        and not recipe.sparsify
        and _same_model(recipe.teacher, recipe.baseline)
    ):
        yield SAME_NET
    if distill.teacher == "self" and recipe.teacher:
        yield "the section teacher has no effect with distill.teacher=self: set teacher=null"
    for knob in distill.idle(distill.teacher):
        if getattr(distill, knob) != _default(distill, knob):
            yield f"distill.{knob}={getattr(distill, knob)} has no effect with distill.teacher={distill.teacher}: leave it out"
    read = [knob for knob in distill.WEIGHTS if knob not in distill.idle(distill.teacher)]
    if not any(getattr(distill, knob) for knob in read):
        yield f"{', '.join(f'distill.{knob}' for knob in read)}: all 0, so nothing is distilled; set distill=null"
    for knob in ("feature_loss", "layers"):
        if not distill.feature_weight and getattr(distill, knob) != _default(distill, knob):
            yield f"distill.{knob} has no effect with distill.feature_weight=0: leave it out"
    if distill.feature_weight and distill.feature_loss == "relation" and distill.batch == 1:
        yield "distill.feature_loss=relation compares the images of a batch: distill.batch=1 is too small"
    if distill.images and distill.data_free:
        yield "distill.images and distill.data_free are both given: set one of them to null"
    if not distill.labelled and distill.alpha != _default(distill, "alpha"):
        yield f"distill.alpha={distill.alpha} has no effect without labels: leave it out"
    if distill.data_free is None and distill.data_free_steps != _default(distill, "data_free_steps"):
        yield "distill.data_free_steps has no effect without distill.data_free: leave it out"
    known = "auto" not in (distill.close_mosaic, distill.epochs)  # else `auto_values.resolve` checks the recipe again
    if distill.off_without_mosaic and known and not 0 < number(distill.close_mosaic) < number(distill.epochs):
        yield (
            f"distill.off_without_mosaic=true trains the last distill.close_mosaic={distill.close_mosaic} of "
            f"{distill.epochs} epochs on labels alone: set close_mosaic from 1 to {number(distill.epochs) - 1}"
        )
    if distill.off_without_mosaic and not distill.labelled:
        yield "distill.off_without_mosaic=true trains epochs on labels alone, and there are no labels: set it to false"


def _default(section: Section, knob: str) -> Any:
    return type(section).model_fields[knob].default


def _same_model(teacher: SourceConfig | None, baseline: SourceConfig) -> bool:
    """Return whether teacher and baseline are the same model: no teacher, the same settings, or the same file."""
    if teacher is None or teacher == baseline:
        return True
    if teacher.weights is None or baseline.weights is None:
        return False  # at least one is trained, and the settings differ
    folder = os.path.normpath(home.weights()) + os.sep
    names = {os.path.normpath(weights).removeprefix(folder) for weights in (teacher.weights, baseline.weights)}
    try:
        return len(names) == 1 or os.path.samefile(teacher.weights, baseline.weights)
    except (OSError, ValueError):  # a file is missing; the stage that reads it reports that
        return False
