"""Sparse training: a penalty on prunable channels, so that those that carry little can go."""

from __future__ import annotations

import json

from torch import nn

from yolo_compress import progress
from yolo_compress.errors import NumericsError
from yolo_compress.files.atomic import atomic_write
from yolo_compress.prune.batchnorm import reestimate_batchnorm
from yolo_compress.prune.graph import prunable
from yolo_compress.prune.penalty import PENALTIES, macs_scale
from yolo_compress.prune.sparsify import SparseTraining, collapsed, masses, verdict
from yolo_compress.recipe.recipe import PruneConfig, SparsifyConfig
from yolo_compress.stages import Job
from yolo_compress.stages._batches import chosen, letterboxed
from yolo_compress.stages._training import finish, fit
from yolo_compress.stages.metrics import ModelMetrics, SparsifyMetrics, of_model
from yolo_compress.train import checkpoint

REESTIMATE_IMAGES = PruneConfig.model_fields["calib_images"].default  # what `prune` takes for the same purpose


def run(job: Job) -> SparsifyMetrics:
    """`model.pt` with sparse gammas, `gammas.json`, their histogram before training and after each epoch, and their mass."""
    model = checkpoint.load_model(job.inputs["baseline"].file("model.pt"))
    before = masses(model)
    hook = penalised(job, model)
    trained = fit(job, model, [hook], "sparsify")
    after = masses(trained)
    progress.say(f"sparsify: {verdict(before, after)}")
    atomic_write(job.out / "gammas.json", json.dumps(hook.histograms) + "\n")
    return {**finished(job, trained), "gamma_mass_under_cut_before": before, "gamma_mass_under_cut_after": after}


def finished(job: Job, trained: nn.Module) -> ModelMetrics:
    """Write and measure; where the net seems to have collapsed, first let BatchNorm's averages catch up with the gammas.

    They follow over some 33 steps (momentum 0.03), and the EMA delays them: a few fast steps leave a healthy net that finds
    nothing. Statistics of images without augmentation are not those of training, so they are taken only where needed.

    Raises:
        NumericsError: the net finds next to nothing with fresh statistics too.
    """
    before = of_model(job.inputs["baseline"])["map50_95"]
    metrics = finish(job, trained)
    if not collapsed(before, stale := metrics["map50_95"]):
        return metrics
    seen = reestimate_batchnorm(
        trained, letterboxed(chosen(job, REESTIMATE_IMAGES), job.imgsz_hw, job.dataset.channels)
    )
    metrics = finish(job, trained)
    if collapsed(before, fresh := metrics["map50_95"]):
        raise NumericsError(
            f"sparsify: mAP50-95 fell from {before:.3f} to {fresh:.3f}: the net collapsed; the one before sparse training is "
            f"kept. Lower sparsify.l1 (now {job.config.l1:g}) or sparsify.lr0"
        )
    progress.say(
        f"sparsify: BatchNorm's averages had not followed the gammas (mAP50-95 {stale:.3f}); taken anew from "
        f"{seen} training images: {fresh:.3f}. A lower sparsify.lr0 over more epochs avoids this"
    )
    return metrics


def penalised(job: Job, model: nn.Module) -> SparseTraining:
    """The hook that the section asks for."""
    config: SparsifyConfig = job.config
    scale = macs_scale(model, prunable(model), job.imgsz_hw) if config.lambda_scale == "macs" else None
    return SparseTraining(PENALTIES[config.penalty](), config.l1, config.ramp_epochs, scale, config.gamma_lr_scale)
