"""Stage `sparsify`: train with a penalty on prunable channels, so that more channels can be removed."""

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
from yolo_compress.stages._calibration_images import calibration_samples, letterboxed
from yolo_compress.stages._training import finish, fit, model_of
from yolo_compress.stages.metrics import ModelMetrics, SparsifyMetrics, of_model

REESTIMATE_IMAGES = PruneConfig.model_fields["calib_images"].default  # same number as `prune` uses for BatchNorm


def run(job: Job) -> SparsifyMetrics:
    """Train with a sparsity penalty, write `model.pt`, and return the metrics.

    Also write `gammas.json`: histograms of the BatchNorm gammas before training and after each epoch.
    """
    model = model_of(job, "baseline")
    before = masses(model)
    hook = penalty_hook(job, model)
    trained = fit(job, model, [hook], "sparsify")
    after = masses(trained)
    progress.say(f"sparsify: {verdict(before, after)}")
    atomic_write(job.out / "gammas.json", json.dumps(hook.histograms) + "\n")
    return {**finish_sparse(job, trained), "gamma_mass_under_cut_before": before, "gamma_mass_under_cut_after": after}


def finish_sparse(job: Job, trained: nn.Module) -> ModelMetrics:
    """Write and validate the model. If mAP collapsed, re-estimate BatchNorm, then write and validate again.

    BatchNorm's averages follow the gammas over about 33 steps (momentum 0.03), and the EMA delays them further. After a few fast
    steps a good model may therefore detect nothing. The averages are re-estimated only in that case, because images without
    augmentation have other statistics than training images.

    Raises:
        NumericsError: mAP is still collapsed after BatchNorm was re-estimated.
    """
    before = of_model(job.inputs["baseline"])["map50_95"]
    metrics = finish(job, trained)
    if not collapsed(before, stale := metrics["map50_95"]):
        return metrics
    images = reestimate_batchnorm(
        trained, letterboxed(calibration_samples(job, REESTIMATE_IMAGES), job.imgsz_hw, job.dataset.channels)
    )
    metrics = finish(job, trained)
    if collapsed(before, fresh := metrics["map50_95"]):
        raise NumericsError(
            f"sparsify: mAP50-95 fell from {before:.3f} to {fresh:.3f}: the model collapsed and is not published. "
            f"Lower sparsify.l1 (now {job.config.l1:g}) or sparsify.lr0"
        )
    progress.say(
        f"sparsify: BatchNorm's averages had not followed the gammas (mAP50-95 {stale:.3f}); re-estimated on "
        f"{images} training images: {fresh:.3f}. A lower sparsify.lr0 over more epochs avoids this"
    )
    return metrics


def penalty_hook(job: Job, model: nn.Module) -> SparseTraining:
    """Return the training hook that adds the penalty of the section `sparsify` to the loss."""
    config: SparsifyConfig = job.config
    scale = macs_scale(model, prunable(model), job.imgsz_hw) if config.lambda_scale == "macs" else None
    return SparseTraining(PENALTIES[config.penalty](), config.l1, config.ramp_epochs, scale, config.gamma_lr_scale)
