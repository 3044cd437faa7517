"""Channel pruning to a budget: rank, hand over, cut, re-estimate BatchNorm, fine-tune."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from yolo_compress import progress, ultra
from yolo_compress.artifact import atomic_write
from yolo_compress.data import Sample
from yolo_compress.prune.budget import Plan, choose
from yolo_compress.prune.criteria import find, scores
from yolo_compress.prune.evidence import Evidence
from yolo_compress.prune.graph import prunable, prune
from yolo_compress.prune.reconstruct import reconstruct
from yolo_compress.prune.recovery import reestimate_batchnorm
from yolo_compress.recipe import PruneConfig
from yolo_compress.stages import Job
from yolo_compress.stages.batches import chosen, letterboxed
from yolo_compress.stages.training import finish, fit, measure, parent


def run(job: Job) -> dict[str, Any]:
    """`model.pt` of stock classes with fewer channels, `channels.json`, and mAP at each step of the recovery."""
    config: PruneConfig = job.config
    model = ultra.load_model(job.inputs["sparsify"].file("model.pt"))
    samples = chosen(job, config.calib_images)
    plan = cut(job, model, samples)
    metrics: dict[str, Any] = {
        "kept_flops": plan.kept_flops,
        "map50_95_after_cut": measure(job, model, "after the cut")["map50_95"],
    }
    reestimate_batchnorm(model, letterboxed(samples, job.imgsz_hw))
    metrics["map50_95_after_bn"] = measure(job, model, "after re-estimating BatchNorm")["map50_95"]
    progress.say(
        f"prune: {plan.kept_flops:.1%} of the MACs kept, mAP50-95 {metrics['map50_95_after_cut']:.3f} after the cut, "
        f"{metrics['map50_95_after_bn']:.3f} after re-estimating BatchNorm"
    )
    hooks = []
    if config.teach_from_parent and config.epochs:
        hooks.append(parent(job.inputs["baseline"]))
    trained = fit(job, model, hooks, "prune")
    return {**metrics, **finish(job, trained)}


def cut(job: Job, model: nn.Module, samples: Sequence[Sample]) -> Plan:
    """Remove channels from `model` in place and keep the widths beside the result."""
    config: PruneConfig = job.config
    groups = prunable(model)
    evidence = Evidence(
        model,
        groups,
        images=lambda: letterboxed(samples, job.imgsz_hw),
        losses=partial(ultra.losses, dataset=job.dataset, samples=samples, imgsz_px=max(job.imgsz_hw)),
        seed=job.recipe.run.seed,
    )
    plan = choose(
        model,
        groups,
        scores(evidence, find(config.criterion)),
        config.keep_flops,
        config.round_to,
        job.imgsz_hw,
        floor=config.floor,
        scope=config.scope,
    )
    if config.reconstruct:
        reconstruct(model, groups, plan.keep, evidence.moments)
    prune(model, plan.keep)
    atomic_write(job.out / "channels.json", json.dumps(plan.widths) + "\n")
    return plan
