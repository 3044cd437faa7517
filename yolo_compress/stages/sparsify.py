"""Sparse training: L1 on the BatchNorm gammas of prunable channels, so that those that carry little can go."""

from __future__ import annotations

import json
from typing import Any

from yolo_compress import ultra
from yolo_compress.artifact import atomic_write
from yolo_compress.prune.gamma import GammaL1
from yolo_compress.recipe import SparsifyConfig
from yolo_compress.stages import Job
from yolo_compress.stages.training import finish, fit


def run(job: Job) -> dict[str, Any]:
    """`model.pt` with sparse gammas, and `gammas.json`: their histogram before training and after each epoch."""
    config: SparsifyConfig = job.config
    model = ultra.load_model(job.inputs["baseline"].file("model.pt"))
    hook = GammaL1(config.l1, config.ramp_epochs)
    trained = fit(job, model, [hook], "sparsify")
    atomic_write(job.out / "gammas.json", json.dumps(hook.histograms) + "\n")
    return finish(job, trained)
