"""Stage `prune`: remove channels or factorise convolutions to meet a budget, or set weights to zero. Then repair and fine-tune.

Channels are removed in one cut or in several rounds. `prune.then` factorises after that.
"""

from __future__ import annotations

import copy
import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import nn

from yolo_compress import progress
from yolo_compress.data.dataset import Dataset, Sample
from yolo_compress.export import float_onnx
from yolo_compress.export.activations import check_int8
from yolo_compress.files.atomic import atomic_write
from yolo_compress.files.csv_text import csv_text
from yolo_compress.prune import masks
from yolo_compress.prune.batchnorm import reestimate_batchnorm
from yolo_compress.prune.depth import remove
from yolo_compress.recipe import knob_types
from yolo_compress.recipe.recipe import PruneConfig, Recipe
from yolo_compress.report.low_rank import low_rank_note
from yolo_compress.stages import Job, _load_or_train, _prune_plan
from yolo_compress.stages._calibration_images import calibration_samples, check_calibration, letterboxed
from yolo_compress.stages._low_rank_plan import LowRankPlanner
from yolo_compress.stages._prune_plan import Planner
from yolo_compress.stages._training import finish, fit, measure, model_of, teacher_hook
from yolo_compress.stages.metrics import Cut, LatencyBudget, PruneMetrics, Repaired, Zeroed


def run(job: Job) -> PruneMetrics:
    """Prune the model, fine-tune it, and write it as `model.pt`, in Ultralytics' own classes. Return the metrics.

    If channels are removed, also write `channels.json`. If channels are removed or convolutions factorised, also write
    `flops.json`. If `prune.sensitivity` is on, also write `sensitivity.json` and `sensitivity.csv`.
    """
    model = model_of(job, "sparsify")
    if job.config.kind in ("channel", "low_rank"):
        trained, cut = _channels(job, model) if job.config.kind == "channel" else _low_rank(job, model)
        return {**cut, **finish(job, trained)}
    trained, zeroed = _zeros(job, model)
    return {**zeroed, **finish(job, trained)}


def check(recipe: Recipe, dataset: Dataset) -> None:
    """Check, before any stage runs, the calibration images, the criterion and the budget.

    Raises:
        RecipeError: The criterion is unknown, the table of layer times does not fit, or no pruning reaches the budget. The model is
            factorised already. Or it is to be timed in INT8, and INT8 files do not support an activation of it.
        EnvironmentLacks: The runtime to time layers on is missing.
        CorruptArtifact: The table of layer times is damaged.
        DataError: The calibration images cannot be used (see `check_calibration`).
    """
    assert recipe.prune is not None
    check_calibration(recipe, dataset, "prune")
    if recipe.prune.kind in ("channel", "low_rank"):
        model = _load_or_train.start(recipe.baseline, dataset, recipe.run.seed, "baseline")
        _prune_plan.check(recipe.prune, model, recipe.data.imgsz_hw)
        if recipe.prune.latency_ms is not None and recipe.prune.latency_precision == "int8":
            check_int8(model, float_onnx.OPSET)


def _channels(job: Job, model: nn.Module) -> tuple[nn.Module, Cut]:
    """Remove channels in one or several rounds, with fine-tuning after each. Return the model and the metrics."""
    rounds = job.config.rounds
    planner = Planner(job, model)
    curve: list[dict[str, object]] = []
    for number, (part, what) in enumerate(parts(job, "prune"), 1):
        original = copy.deepcopy(model) if job.config.then == "low_rank" else None
        cut = _cut(part, model, planner, number)
        if original is not None:
            cut = {**cut, **_factorise(part, model, planner, original)}
        model = tuned(part, model, what)
        curve += _rows(part.out / "results.csv", len(curve))
    if rounds > 1 and curve:
        atomic_write(job.out / "results.csv", csv_text(curve))
    return model, cut


def _low_rank(job: Job, model: nn.Module) -> tuple[nn.Module, Cut]:
    """Factorise convolutions and fine-tune. Return the model and the metrics. The channels between layers stay."""
    cut = _factorise(job, model, Planner(job, model), copy.deepcopy(model))
    return tuned(job, model, "prune"), cut


def _factorise(job: Job, model: nn.Module, planner: Planner, original: nn.Module) -> Cut:
    """Factorise convolutions in place, refit and re-estimate BatchNorm. Return the metrics.

    Args:
        job: Job of the stage, or of its only round.
        model: The original, or the channel-pruned model.
        planner: Planner of the original.
        original: The model before pruning. It is not changed.
    """
    low_rank = LowRankPlanner(job, model, planner)
    plan, budget = low_rank.timed(job.work) if planner.table else (low_rank.plan(), LatencyBudget())
    low_rank.factorise(model, plan)
    macs = {name: (shape.macs, plan.macs.get(name, (0, 0))[1]) for name, shape in planner.shapes.items()}
    atomic_write(job.out / "flops.json", json.dumps(macs) + "\n")
    kept_flops = plan.macs_after / sum(before for before, _ in macs.values())
    progress.say(f"prune: {kept_flops:.1%} of the MACs remain")
    repaired = _repaired(job, model, planner.samples)
    found = low_rank.figures(plan, model, original)
    progress.say(f"prune: {low_rank_note(found)}")
    metrics: Cut = {**budget, "kept_flops": kept_flops, **repaired, "low_rank": found}
    return metrics


def parts(job: Job, what: str) -> Iterator[tuple[Job, str]]:
    """Yield the job and the name of each round of pruning. `job.config` is the section `prune`."""
    rounds = job.config.rounds
    for number in range(1, rounds + 1):
        yield (job, what) if rounds == 1 else (_part(job, number), f"{what} {number}/{rounds}")


def _part(job: Job, number: int) -> Job:
    """Return a copy of the job for round `number`, with the round's share of the epochs and its own scratch folder."""
    config: PruneConfig = job.config
    share, rest = divmod(knob_types.number(config.epochs), config.rounds)
    epochs = share + (rest if number == config.rounds else 0)
    work = job.work / f"round-{number}"
    work.mkdir(exist_ok=True)
    return replace(job, config=config.model_copy(update={"epochs": epochs}), work=work)


def _cut(job: Job, model: nn.Module, planner: Planner, number: int) -> Cut:
    """Remove channels, and with `prune.depth` bottlenecks, reconstruct and re-estimate BatchNorm, in place. Return the metrics."""
    cut, evidence, budget = planner.cut(model, job.work, number)
    remove(model, cut, evidence.moments if job.config.reconstruct else None)
    gone = (0, 0)  # bottlenecks that an earlier round removed are not in the plan of this one
    widths = {name: (before, cut.widths.get(name, gone)[1]) for name, before in planner.dense.items()}
    macs = {name: (shape.macs, cut.macs.get(name, gone)[1]) for name, shape in planner.shapes.items()}
    bottlenecks = {name: (before, cut.bottlenecks.get(name, gone)[1]) for name, before in planner.bottlenecks.items()}
    atomic_write(job.out / "channels.json", json.dumps(widths) + "\n")
    atomic_write(job.out / "flops.json", json.dumps(macs) + "\n")
    kept_flops = cut.macs_after / sum(before for before, _ in macs.values())
    progress.say(f"prune: {kept_flops:.1%} of the MACs remain")
    metrics: Cut = {**budget, "kept_flops": kept_flops, **_repaired(job, model, planner.samples)}
    if bottlenecks:
        progress.say(f"prune: bottlenecks: {_prune_plan.bottlenecks_text(bottlenecks)}")
        metrics["bottlenecks"] = bottlenecks
    return metrics


def _zeros(job: Job, model: nn.Module) -> tuple[nn.Module, Zeroed]:
    """Set weights of small magnitude to zero, and fine-tune with these weights fixed at zero. Return the model and the metrics.

    The number of channels does not change.
    """
    config: PruneConfig = job.config
    if config.kind == "two_four":
        zero_masks = masks.two_four(model)
    else:
        zero_masks = masks.unstructured(model, config.sparsity, "global" if config.scope == "global" else "local")
    masks.apply(model, zero_masks)
    dense = sum(isinstance(module, nn.Conv2d) for module in model.modules()) - len(zero_masks)
    progress.say(f"prune: {masks.sparsity_of(model):.1%} of the weights are zero; {dense} convolutions have none")
    kind: Literal["unstructured", "two_four"] = "two_four" if config.kind == "two_four" else "unstructured"
    metrics: Zeroed = {"kind": kind, **_repaired(job, model, calibration_samples(job, config.calib_images))}
    return tuned(job, model, "prune"), metrics


def _repaired(job: Job, model: nn.Module, samples: Sequence[Sample]) -> Repaired:
    """Re-estimate the BatchNorm statistics in place, and return mAP before and after that."""
    cut = measure(job, model, "after the cut")["map50_95"]
    reestimate_batchnorm(model, letterboxed(samples, job.imgsz_hw, job.dataset.channels))
    repaired = measure(job, model, "after re-estimating BatchNorm")["map50_95"]
    progress.say(f"prune: mAP50-95 {cut:.3f} after the cut, {repaired:.3f} after re-estimating BatchNorm")
    return {"map50_95_after_cut": cut, "map50_95_after_bn": repaired}


def tuned(job: Job, model: nn.Module, what: str) -> nn.Module:
    """Fine-tune the model, with the baseline as teacher if `prune.teach_from_parent` is true."""
    hooks = (
        [teacher_hook(job.inputs["baseline"].file("model.pt"))]
        if job.config.teach_from_parent and job.config.epochs
        else []
    )
    return fit(job, model, hooks, what)


def _rows(file: Path, epochs_before: int) -> list[dict[str, object]]:
    """Return the rows of one round's results.csv. `epochs_before` is added to each epoch."""
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as handle:
        return [{**row, "epoch": int(row["epoch"]) + epochs_before} for row in csv.DictReader(handle)]
