"""Quantisation: calibrate on un-augmented training images, then train with fake quantisers (epochs: 0 is PTQ)."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

from yolo_compress import ultra
from yolo_compress.artifact import atomic_write
from yolo_compress.hook import TrainHook
from yolo_compress.quant.calibrate import ptq
from yolo_compress.quant.fakequant import FakeQuant, attach
from yolo_compress.recipe import QatConfig
from yolo_compress.stages import Job
from yolo_compress.stages.batches import chosen, letterboxed, write_list
from yolo_compress.stages.training import finish, fit, measure, parent


def run(job: Job) -> dict[str, Any]:
    """`model.pt` of stock classes, and `quant.json` with the ranges that belong to it; mAP is that of the quantised net."""
    config: QatConfig = job.config
    model = ultra.load_model(job.inputs["distill"].file("model.pt"))
    images = chosen(job, config.calib_images)
    quantiser = FakeQuant(
        partial(
            ptq,
            batches=lambda: letterboxed(images, job.imgsz_hw),
            method=config.calibrator,
            percentile=config.percentile,
        ),
        weight_bits=config.weight_bits,
    )
    hooks: list[TrainHook] = []
    if config.teach_from_parent and config.epochs:
        hooks.append(parent(job.inputs["distill"].file("model.pt")))
    trained = fit(job, model, [*hooks, quantiser], "qat")
    assert quantiser.state is not None
    atomic_write(job.out / "quant.json", quantiser.state.dumps())
    float_metrics = finish(job, trained)
    quantised = deepcopy(trained)
    attach(quantised, quantiser.state, config.weight_bits)
    return {
        **float_metrics,
        **measure(job, quantised, "quantised"),
        "map50_95_float_weights": float_metrics["map50_95"],
        "calibration_set": write_list(job, images),
        "calibration_images": len(images),
        "weight_bits": config.weight_bits,
        "quantised_convs": len(quantiser.state.convs),
    }
