"""Stage `qat`: calibrate on training images without augmentation, then train with fake quantisation. 0 epochs is PTQ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from typing import cast

from torch import nn

from yolo_compress import progress
from yolo_compress.data.dataset import Dataset, Sample
from yolo_compress.files.atomic import atomic_write
from yolo_compress.files.csv_text import csv_text
from yolo_compress.quant import sensitivity
from yolo_compress.quant.calibrate import ptq
from yolo_compress.quant.fakequant import FakeQuant, attach, check_installed
from yolo_compress.quant.plan import plan
from yolo_compress.quant.ranges import QuantState
from yolo_compress.recipe.recipe import QatConfig, Recipe
from yolo_compress.stages import Job, _float_cost, _load_or_train, load_progress
from yolo_compress.stages._calibration_images import calibration_samples, check_calibration, letterboxed, write_list
from yolo_compress.stages._model_score import MEASURES
from yolo_compress.stages._training import finish, fit, measure, model_of, teacher_hook
from yolo_compress.stages.file_types import QatSensitivity
from yolo_compress.stages.metrics import QatMetrics, Sensitive
from yolo_compress.train.hook import TrainHook

PLACED = ("tensor", "precision", "group", "why")  # columns of placement.csv


def run(job: Job) -> QatMetrics:
    """Quantise the model and train it. Write `model.pt` in Ultralytics' own classes, `quant.json` (scales) and `placement.csv`.

    `placement.csv` has a row for each tensor: its precision, its group, and the reason for the precision. Tensors of a group share
    a scale. mAP in the metrics is measured on the quantised model.
    """
    config: QatConfig = job.config
    model = model_of(job, "distill")
    images = calibration_samples(job, config.calib_images)
    calibrated = partial(
        ptq,
        batches=partial(letterboxed, images, job.imgsz_hw, job.dataset.channels),
        method=config.calibrator,
        percentile=config.percentile,
        weight_bits=config.weight_bits,
    )
    left = config.float_groups or ()
    metrics: Sensitive = {}
    state = calibrated(model, left=left)
    if config.sensitivity != "off":
        chosen_groups, metrics = _sensitivity(job, model, state, images, left)
        state = state.without(group for group in plan(model).groups if group.name in chosen_groups)
        left = (*left, *chosen_groups)
    placed = plan(model, left)
    atomic_write(job.out / "placement.csv", csv_text([dict(zip(PLACED, row, strict=True)) for row in placed.rows()]))
    quantiser = FakeQuant(partial(calibrated, left=left), state, config.learned_scales)
    hooks: list[TrainHook] = []
    if config.teach_from_parent and config.epochs:
        hooks.append(teacher_hook(job.inputs["distill"].file("model.pt")))
    # On a CPU mixed precision is bfloat16, which has no more significant bits than INT8.
    mixed = config.amp and job.recipe.run.device != "cpu"
    trained = fit(job, model, [*hooks, quantiser], "qat", amp=mixed)
    atomic_write(job.out / "quant.json", quantiser.state.dumps())
    float_metrics = finish(job, trained)
    quantised = deepcopy(trained)
    attach(quantised, quantiser.state)
    return {
        **float_metrics,
        **measure(job, quantised, "quantised"),
        "map50_95_float_weights": float_metrics["map50_95"],
        "calibration_set": write_list(job, images),
        "calibration_images": len(images),
        "weight_bits": config.weight_bits,
        "quantised_convs": len(quantiser.state.convs),
        "float_groups": list(left),
        **metrics,
    }


def check(recipe: Recipe, dataset: Dataset) -> None:
    """Check, before any stage runs, that the model can be quantised and has the groups in `float_groups`.

    Also check that the cost of groups in float (`qat.sensitivity_price`) can be measured on this machine. The checks use the
    baseline, because the pruned model does not exist yet. Pruning does not rename groups.

    Raises:
        RecipeError: The baseline cannot be loaded or quantised, or has no group of a name in `float_groups`.
        DataError: The calibration images cannot be used (see `check_calibration`).
        EnvironmentLacks: ModelOpt, `huggingface_hub` or the runtime of `qat.sensitivity_price` is not installed.
    """
    assert recipe.qat is not None
    check_calibration(recipe, dataset, "qat")
    check_installed()
    _float_cost.check(recipe.qat.sensitivity_price)
    plan(_load_or_train.start(recipe.baseline, dataset, recipe.run.seed, "baseline"), recipe.qat.float_groups or ())


def _sensitivity(
    job: Job, model: nn.Module, state: QuantState, images: Sequence[Sample], fixed: tuple[str, ...]
) -> tuple[tuple[str, ...], Sensitive]:
    """Measure the sensitivity to INT8. Return the groups of tensors that stay in float, and the metrics.

    The groups in `fixed`, from the recipe, stay in float too. If an earlier run was killed during the measurement, continue it.
    """
    config: QatConfig = job.config
    value = partial(MEASURES[config.sensitivity], job, images)
    better = config.sensitivity == "map50_95"
    placed = plan(model, fixed)
    file = job.work / "sensitivity.json"
    found: QatSensitivity = cast(QatSensitivity, load_progress(file, {"groups": dict})) or {"groups": {}}
    if "float" not in found:
        found["float"] = value(model)
    quantised = deepcopy(model)
    attach(quantised, state)
    if "int8" not in found:
        found["int8"] = value(quantised)
    if config.sensitivity_price != "gflops" and "layer_ms" not in found:
        found["layer_ms"] = _float_cost.layer_ms(job, model, state, config.sensitivity_price)
        atomic_write(file, json.dumps(found) + "\n")
    with progress.bar("sensitivity", len(placed.int8), "group", done=len(found["groups"])) as advance:

        def save() -> None:
            atomic_write(file, json.dumps(found) + "\n")
            advance(1)

        alone = sensitivity.measure(quantised, placed, value, found["groups"], save)
    costs = found["compute_gflops"] = _float_cost.compute_gflops(model, placed, job.imgsz_hw)
    if "layer_ms" in found:
        costs = found["price_ms"] = sensitivity.price_ms(placed, found["layer_ms"])
    worst = found["float"] * (1 - config.max_drop if better else 1 + config.max_drop)
    left, then = sensitivity.choose(quantised, placed, alone, costs, value, found["int8"], worst, better)
    found |= {
        "measure": "map50_95" if better else "loss",
        "images": len(images),
        "worst": worst,
        "left": list(left),
        "then": then,
        "price": config.sensitivity_price,
    }
    atomic_write(job.out / "sensitivity.json", json.dumps(found) + "\n")
    atomic_write(job.out / "sensitivity.csv", csv_text(sensitivity.rows(found)))
    enough = then >= worst if better else then <= worst
    metrics: Sensitive = {"sensitivity_enough": enough}
    if "price_ms" in found:
        metrics["float_price_ms"] = sum(costs[name] for name in left)
    progress.say(
        f"qat: {config.sensitivity} {found['float']:.4f} in float, {found['int8']:.4f} in INT8, {then:.4f} with "
        f"{len(left)} of {len(placed.int8)} groups in float ({', '.join(left) or 'none'}"
        + (f", {metrics['float_price_ms']:.3f} ms on {config.sensitivity_price}" if "float_price_ms" in metrics else "")
        + "); "
        + ("enough" if enough else f"no set of groups reaches the required {worst:.4f}")
    )
    return left, metrics
