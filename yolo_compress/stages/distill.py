"""Distillation: the pruned student learns from labels and from a source, or from the source's word alone."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from yolo_compress import progress
from yolo_compress.data.dataset import Dataset
from yolo_compress.distill.checks import same_weights
from yolo_compress.distill.hook import Teach
from yolo_compress.distill.teacher import Frozen, Own, Peer, Source
from yolo_compress.errors import RecipeError
from yolo_compress.recipe.checks import SAME_NET
from yolo_compress.recipe.knobs import number
from yolo_compress.recipe.recipe import DistillConfig, Recipe
from yolo_compress.stages import Job, _source
from yolo_compress.stages._inverted_images import inverted
from yolo_compress.stages._training import CLASS_GAIN, finish, fit
from yolo_compress.stages.metrics import DistillMetrics, of_model
from yolo_compress.train import checkpoint


def run(job: Job) -> DistillMetrics:
    """`model.pt` of the student after distillation; without labels `trained_on` says what it saw and how far that carried.

    Hinton's alpha shares the class term: (1 - alpha) of the hard labels' loss, alpha of the soft ones'.
    """
    config: DistillConfig = job.config
    student = checkpoint.load_model(job.inputs["prune"].file("model.pt"))
    teacher = checkpoint.load_model(job.inputs["teacher"].file("model.pt"))
    if config.labelled:
        soft = config.teacher != "self" and config.logit_weight
        hard_share = 1.0 - config.alpha if soft else 1.0
        trained = fit(job, student, [teaching(config, teacher)], "distill", class_gain=CLASS_GAIN * hard_share)
        return {**finish(job, trained)}
    if config.data_free is not None:
        samples, what = (
            inverted(job, teacher, config.data_free, config.data_free_steps),
            "images inverted from the teacher",
        )
    else:
        samples, what = job.dataset.unlabelled, "images without labels"
    told = replace(job, dataset=replace(job.dataset, train=samples))
    # without boxes only the class term of the labels is not 0: it would call everything background
    trained = fit(told, student, [teaching(config, teacher)], "distill", class_gain=0.0)
    metrics = finish(job, trained)
    before = of_model(job.inputs["prune"])["map50_95"]
    said = f"{len(samples)} {what}, no label: mAP50-95 {before:.3f} before, {metrics['map50_95']:.3f} after"
    progress.say(f"distill: trained on {said}")
    return {**metrics, "trained_on": said}


def check(recipe: Recipe, dataset: Dataset) -> None:
    """Refuse, before any stage runs, what cannot teach: the nets that the chain starts from stand for what becomes of them.

    Raises:
        RecipeError: See `_source.start`, `Teach` and `checkpoint.load_model`.
    """
    assert recipe.distill is not None
    config, seed = recipe.distill, recipe.run.seed
    student = _source.start(recipe.baseline, dataset, seed, "baseline")
    teacher = _source.start(
        recipe.teacher or recipe.baseline, dataset, seed, "teacher" if recipe.teacher else "baseline"
    )
    teaching(config, teacher).on_model(student)
    given = recipe.baseline.weights and recipe.teacher and recipe.teacher.weights
    if (
        config.teacher != "self"
        and given
        and not recipe.prune
        and not recipe.sparsify
        and same_weights(student, teacher)
    ):
        raise RecipeError(SAME_NET)  # the same weights in files of two names


def teaching(config: DistillConfig, teacher: nn.Module) -> Teach:
    """The hook that the section asks for; `teacher` is whom it names, unless that is the student itself."""
    soft_share = config.alpha if config.labelled else 1.0
    head = {
        "class_weight": config.logit_weight * soft_share * CLASS_GAIN,
        "box_weight": config.box_weight,
        "iou_weight": config.iou_weight,
    }
    whom: Source
    if config.teacher == "self":
        whom, head = Own(), dict.fromkeys(head, 0.0)
    else:
        whom = Peer(teacher) if config.teacher == "mutual" else Frozen(teacher)
    return Teach(
        whom,
        feature_weight=config.feature_weight,
        **head,
        temperature=config.temperature,
        feature_loss=config.feature_loss,
        layers=config.layers,
        ramp_epochs=config.ramp_epochs,
        off_epochs=number(config.close_mosaic) if config.off_without_mosaic else 0,
    )
