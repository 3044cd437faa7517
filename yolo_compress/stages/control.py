"""Stage `control`: train models that lack one part of the chain each, for a fair comparison with the compressed model.

Every control starts from the baseline and repeats the epochs and schedules of `sparsify`, `prune` and `distill`:

    longer: without a teacher, a penalty or a cut.
    taught: as `longer`, with the teachers of `prune` and `distill`.
    narrowed: as `taught`, and cut to the MACs of the pruned model. All layers keep the same share of their channels: the first ones.

The chain is thus split into steps: longer training, the teacher, fewer channels, and the choice of channels.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from yolo_compress import progress
from yolo_compress.data.dataset import Dataset
from yolo_compress.errors import RecipeError
from yolo_compress.prune import budget
from yolo_compress.prune.batchnorm import reestimate_batchnorm
from yolo_compress.prune.calibration_stats import Evidence
from yolo_compress.prune.cost import conv_shapes
from yolo_compress.prune.criteria import scores
from yolo_compress.prune.graph import Group, prunable, prune
from yolo_compress.recipe import controls
from yolo_compress.recipe.knob_types import ControlNet
from yolo_compress.recipe.recipe import PruneConfig, Recipe
from yolo_compress.stages import Job, distill
from yolo_compress.stages._calibration_images import calibration_samples, letterboxed
from yolo_compress.stages._training import finish, fit, model_of
from yolo_compress.stages.metrics import ControlMetrics, ModelMetrics, of_model
from yolo_compress.stages.prune import parts, tuned


def run(job: Job) -> ControlMetrics:
    """Train the controls. For each, write `<control>/model.pt` and the `results.csv` of its trainings. Return their metrics.

    No control is trained if all of them would take longer than `control.max_minutes`.
    """
    nets = controls.chosen(job.recipe)
    if not nets:
        return {"models": {}, "expected_minutes": 0.0, "skipped": "no stage trains in this recipe"}
    minutes = expected_minutes(job)
    limit = job.config.max_minutes
    if limit is not None and minutes > limit:
        reason = f"they would take about {minutes:.0f} min, more than control.max_minutes={limit:g}"
        progress.say(f"control: no control is trained: {reason}")
        return {"models": {}, "expected_minutes": minutes, "skipped": reason}
    progress.say(f"control: {', '.join(nets)}: about {minutes:.0f} min; control=null leaves them out")
    models: dict[str, ModelMetrics] = {}
    for net in nets:
        own = replace(job, out=job.out / net, work=job.work / net)
        own.out.mkdir()
        own.work.mkdir(exist_ok=True)
        models[net] = {**finish(own, _trained(own, net)), "epochs": controls.epochs(job.recipe, net)}
        progress.say(f"control: {net}: mAP50-95 {models[net]['map50_95']:.3f}")
    return {"models": models, "expected_minutes": minutes, "skipped": None}


def check(recipe: Recipe, dataset: Dataset) -> None:
    """Say, before any stage runs, what the controls cost."""
    if nets := controls.chosen(recipe):
        *others, last = controls.trainings(recipe)
        stages = f"{', '.join(others)} and {last}" if others else last
        each = "each train" if len(nets) > 1 else "train"
        progress.say(
            f"control: {', '.join(nets)} will {each} for up to {controls.epochs(recipe)} epochs, the epochs of {stages}; "
            "control=null leaves the controls out"
        )


def expected_minutes(job: Job) -> float:
    """Return the expected time of the controls in minutes, from the time of the stages that they repeat.

    If the chain trained a pruned model, the controls that are not cut take longer.
    """
    dense_step = controls.PRUNED_STEP if controls.cuts(job.recipe) else 1.0
    seconds = 0.0
    for net in controls.chosen(job.recipe):
        own_s = sum(job.inputs[stage].manifest.seconds for stage in controls.trainings(job.recipe, net))
        seconds += own_s if net == "narrowed" else own_s / dense_step
    return seconds / 60


def _trained(job: Job, net: ControlNet) -> nn.Module:
    """Train one control as the stages of the chain train, and return it."""
    model = model_of(job, "baseline")
    for stage in controls.REPEATED:
        section, what = getattr(job.recipe, stage), f"{stage} of control {net}"
        if section is None:
            continue
        own = replace(job, config=section, work=job.work / stage, out=job.out / stage)
        own.work.mkdir(exist_ok=True)
        own.out.mkdir()
        if stage == "prune" and net == "narrowed":
            narrow(own, model)
        if stage not in controls.trainings(job.recipe, net):
            continue
        if stage == "distill" and net != "longer":
            model, _ = distill.taught(own, model, what)
        elif stage == "prune":
            teachers = net != "longer" and section.teach_from_parent
            own = replace(own, config=section.model_copy(update={"teach_from_parent": teachers}))
            for part, name in parts(own, what):
                model = tuned(part, model, name)
        else:
            model = fit(own, model, [], what)
    return model


def narrow(job: Job, model: nn.Module) -> None:
    """Remove channels in place, until the MACs are those of the pruned model. Re-estimate BatchNorm.

    Every layer keeps the same share of its channels, the first ones. So this is a smaller model of the same design, and nothing is
    chosen.

    Args:
        job: Job whose section is `prune`.
        model: Model with the widths of the baseline.

    Raises:
        RecipeError: With equal shares, no widths come within 2 % of the MACs of the pruned model.
    """
    config: PruneConfig = job.config
    share = of_model(job.inputs["prune"])["compute_gflops"] / of_model(job.inputs["baseline"])["compute_gflops"]
    prune(model, _leading(model, share, config, job.imgsz_hw))
    samples = calibration_samples(job, config.calib_images)
    reestimate_batchnorm(model, letterboxed(samples, job.imgsz_hw, job.dataset.channels))


def _leading(model: nn.Module, share: float, config: PruneConfig, imgsz_hw: tuple[int, int]) -> dict[str, Tensor]:
    """Return the channels of each group that a model with `share` of the MACs keeps.

    The widths are rounded to `prune.round_to`, or to a smaller power of two if the MACs cannot be met within 2 % otherwise.
    """
    groups, shapes = prunable(model), conv_shapes(model, imgsz_hw)
    importance, limit = scores(Evidence(model, groups, seed=0), _first), budget.keep_flops(shapes, share)
    step: int = config.round_to
    while True:
        try:
            return dict(budget.choose(model, groups, importance, limit, step, shapes, config.floor, "local").keep)
        except RecipeError:
            if step == 1:
                raise
            step //= 2


def _first(evidence: Evidence, group: Group) -> Tensor:
    """Return scores by which the first channels stay."""
    return torch.arange(group.width, 0, -1, dtype=torch.float32)
