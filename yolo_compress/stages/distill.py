"""Distillation: the pruned student learns from labels, from the teacher's Detect inputs, class scores and box sides."""

from __future__ import annotations

from typing import Any

from yolo_compress import ultra
from yolo_compress.distill.teach import Teach
from yolo_compress.recipe import DistillConfig
from yolo_compress.stages import Job
from yolo_compress.stages.training import CLASS_GAIN, finish, fit


def run(job: Job) -> dict[str, Any]:
    """`model.pt` of the student after distillation.

    Hinton's alpha shares the class term: (1 - alpha) of the hard labels' loss, alpha of the soft ones'.
    """
    config: DistillConfig = job.config
    student = ultra.load_model(job.inputs["prune"].file("model.pt"))
    teacher = ultra.load_model(job.inputs["teacher"].file("model.pt"))
    hook = Teach(
        teacher,
        feature_weight=config.feature_weight,
        class_weight=config.logit_weight * config.alpha * CLASS_GAIN,
        box_weight=config.box_weight,
        temperature=config.temperature,
    )
    hard_share = 1.0 - config.alpha if config.logit_weight else 1.0
    trained = fit(job, student, [hook], "distill", class_gain=CLASS_GAIN * hard_share)
    return finish(job, trained)
