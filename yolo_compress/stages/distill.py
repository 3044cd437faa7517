"""Stage `distill`: the pruned student learns from a teacher, with or without labels."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from yolo_compress import progress
from yolo_compress.data.dataset import Dataset
from yolo_compress.distill.checks import same_weights
from yolo_compress.distill.hook import Teach
from yolo_compress.distill.teacher import Frozen, Own, Peer, Source
from yolo_compress.errors import RecipeError
from yolo_compress.prune.cost import parameters
from yolo_compress.recipe.checks import SAME_NET
from yolo_compress.recipe.knob_types import number
from yolo_compress.recipe.recipe import DistillConfig, Recipe
from yolo_compress.stages import Job, _load_or_train
from yolo_compress.stages._inverted_images import inverted_samples
from yolo_compress.stages._model_score import map50_95
from yolo_compress.stages._training import CLASS_GAIN, finish, fit, model_of
from yolo_compress.stages.metrics import DistillMetrics, HeldBack, of_model


def run(job: Job) -> DistillMetrics:
    """Train the student with the teacher, write it as `model.pt`, and return the metrics.

    The class loss is (1 - alpha) times the loss from the labels plus alpha times the loss from the teacher (Hinton et al., arXiv
    1503.02531). If the training uses no labels, the metric `trained_on` is a text. It has the kind and number of the images, and
    the mAP before and after the distillation.
    """
    trained, images = taught(job, model_of(job, "prune"), "distill")
    model, held = _better(job, trained)
    metrics: DistillMetrics = {**finish(job, model), **held}
    before = of_model(job.inputs["prune"])["map50_95"]
    if images is not None:
        metrics["trained_on"] = f"{images}, no label: mAP50-95 {before:.3f} before, {metrics['map50_95']:.3f} after"
        progress.say(f"distill: trained on {metrics['trained_on']}")
    if metrics["map50_95"] < before:
        hint = "" if job.dataset.held else "; data.hold_back=0.05 makes the chain keep the better of the two models"
        progress.say(f"distill: mAP50-95 fell from {before:.3f} to {metrics['map50_95']:.3f}{hint}")
    return metrics


def _better(job: Job, trained: nn.Module) -> tuple[nn.Module, HeldBack]:
    """Return the better of two models on the images held back: the student before the stage, and `trained`.

    Of two equal models, the trained one is returned. Without such images it always is.
    """
    if not job.dataset.held:
        return trained, {}
    student = model_of(job, "prune")
    before, after = (map50_95(job, job.dataset.held, model) for model in (student, trained))
    kept = "the model before it" if before > after else "the distilled model"
    progress.say(
        f"distill: mAP50-95 on {len(job.dataset.held)} images held back: {before:.3f} before, {after:.3f} after; {kept} is kept"
    )
    found: HeldBack = {"held_map50_95_before": before, "held_map50_95_after": after}
    return (student if before > after else trained), found


def taught(job: Job, student: nn.Module, what: str) -> tuple[nn.Module, str | None]:
    """Train the student with the teacher of the chain.

    Args:
        job: Job whose section is `distill` and whose inputs have `teacher`.
        student: Model to train.
        what: Name of the run in progress lines.

    Returns:
        The trained student, and the number and kind of the images if they have no labels.
    """
    config: DistillConfig = job.config
    teacher = model_of(job, "teacher")
    if config.labelled:
        soft = config.teacher != "self" and config.logit_weight
        hard_share = 1.0 - config.alpha if soft else 1.0
        return fit(job, student, [teaching(config, teacher)], what, class_gain=CLASS_GAIN * hard_share), None
    if config.data_free is not None:
        samples, images = (
            inverted_samples(job, teacher, config.data_free, config.data_free_steps),
            "images inverted from the teacher",
        )
    else:
        samples, images = job.dataset.unlabelled, "images without labels"
    unlabelled_job = replace(job, dataset=replace(job.dataset, train=samples))
    # The images have no boxes, so the class loss from labels would train every detection to be background. Other terms are 0.
    trained = fit(unlabelled_job, student, [teaching(config, teacher)], what, class_gain=0.0)
    return trained, f"{len(samples)} {images}"


def check(recipe: Recipe, dataset: Dataset) -> None:
    """Check, before any stage runs, that the teacher can teach the student. The check uses the models before any training.

    Raises:
        RecipeError: A model cannot be loaded, or the teacher does not match the student (see `Teach`).
    """
    assert recipe.distill is not None
    config, seed = recipe.distill, recipe.run.seed
    student = _load_or_train.start(recipe.baseline, dataset, seed, "baseline")
    teacher = _load_or_train.start(
        recipe.teacher or recipe.baseline, dataset, seed, "teacher" if recipe.teacher else "baseline"
    )
    teaching(config, teacher).on_model(student)
    if recipe.teacher and config.teacher != "self" and (ours := parameters(teacher)) < (theirs := parameters(student)):
        progress.say(
            f"distill: the teacher has fewer parameters ({ours:,}) than the student ({theirs:,}), and may hold it back"
        )
    given = recipe.baseline.weights and recipe.teacher and recipe.teacher.weights
    if (
        config.teacher != "self"
        and given
        and not recipe.prune
        and not recipe.sparsify
        and same_weights(student, teacher)
    ):
        raise RecipeError(SAME_NET)  # two files with the same weights


def teaching(config: DistillConfig, teacher: nn.Module) -> Teach:
    """Return the training hook for distillation, with the settings of `config`. If `config.teacher` is "self", ignore `teacher`."""
    soft_share = config.alpha if config.labelled else 1.0
    head = {
        "class_weight": config.logit_weight * soft_share * CLASS_GAIN,
        "box_weight": config.box_weight,
        "iou_weight": config.iou_weight,
    }
    source: Source
    if config.teacher == "self":
        source, head = Own(), dict.fromkeys(head, 0.0)
    else:
        source = Peer(teacher) if config.teacher == "mutual" else Frozen(teacher)
    return Teach(
        source,
        feature_weight=config.feature_weight,
        **head,
        temperature=config.temperature,
        feature_loss=config.feature_loss,
        layers=config.layers,
        ramp_epochs=config.ramp_epochs,
        off_epochs=number(config.close_mosaic) if config.off_without_mosaic else 0,
    )
