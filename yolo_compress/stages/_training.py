"""Functions that all training stages share: settings, training, validation, and writing of the model."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from yolo_compress.distill.hook import Teach
from yolo_compress.distill.teacher import Frozen
from yolo_compress.errors import EnvironmentLacks
from yolo_compress.evaluate.accuracy import accuracy
from yolo_compress.evaluate.stored_detections import keep
from yolo_compress.evaluate.torch_backend import TorchBackend
from yolo_compress.progress import bar, say
from yolo_compress.prune import masks
from yolo_compress.prune.cost import conv_macs, parameters
from yolo_compress.recipe.recipe import TrainConfig
from yolo_compress.runtime.max_detections import counted
from yolo_compress.stages import Job
from yolo_compress.stages.metrics import ModelMetrics, Validated
from yolo_compress.train import checkpoint, trainer
from yolo_compress.train.hook import TrainHook
from yolo_compress.train.settings import TrainSettings

CLASS_GAIN = 0.5  # Ultralytics' default weight of the class term
# Loss weights with the unpruned or unquantised model as teacher. YOLOv8n on BCCD: mAP50-95 0.618 after pruning, baseline
# 0.614 (`prune recipe=bccd`).
PARENT_CLASS_WEIGHT = 2.0
PARENT_BOX_WEIGHT = 3.0
PARENT_FEATURE_WEIGHT = (
    0.3  # as in `distill`; with Ultralytics' 6 the labels have too little weight for a pruned student
)


def settings(job: Job, **changes: Any) -> TrainSettings:
    """Return the training settings of the section, with `changes` applied. Training images are squares of the longer side."""
    config: TrainConfig = job.config
    schedule = {name: getattr(config, name) for name in TrainConfig.model_fields}
    machine = job.recipe.run
    return TrainSettings(
        **({"class_gain": CLASS_GAIN} | schedule | changes),
        imgsz_px=max(job.imgsz_hw),
        seed=machine.seed,
        device=machine.device,
        workers=machine.workers,
        threads=machine.threads,
        val_every=machine.val_every,
    )


def model_of(job: Job, need: str) -> nn.Module:
    """Load the model of the input artefact `need` onto the recipe's device. Only this function and `fit` choose a model's device."""
    return checkpoint.load_model(job.inputs[need].file("model.pt")).to(device(job))


def fit(job: Job, model: nn.Module, hooks: Sequence[TrainHook], what: str, **changes: Any) -> nn.Module:
    """Train `model` with the settings of the section and `changes`, and write `results.csv`.

    With 0 epochs the hooks are attached and removed without training. The result is on the device of `model_of`.
    """
    training = settings(job, **changes)
    if training.epochs and training.device == "cpu" and torch.cuda.is_available():
        say(f"{what}: trains on the CPU although there is a CUDA device; run.device=0 (make: DEVICE=0) trains there")
    if masks.sparsity_of(model):  # zero weights stay zero in every stage that trains
        hooks = [*hooks, masks.HoldZeros()]
    trained = trainer.train(model, job.dataset, training, hooks, job.work, what).to(device(job))
    if (job.work / "results.csv").is_file():
        shutil.copyfile(job.work / "results.csv", job.out / "results.csv")
    return trained


def teacher_hook(file: Path) -> Teach:
    """Return the training hook for `teach_from_parent`: distillation with the model before the stage as teacher.

    The scores are not softened (temperature 1), because student and teacher differ only in channels or precision.

    Args:
        file: `model.pt` of the teacher.
    """
    return Teach(
        Frozen(checkpoint.load_model(file)),
        feature_weight=PARENT_FEATURE_WEIGHT,
        class_weight=PARENT_CLASS_WEIGHT,
        box_weight=PARENT_BOX_WEIGHT,
        temperature=1.0,
    )


def finish(job: Job, model: nn.Module) -> ModelMetrics:
    """Write `model.pt`, validate the model, and return the metrics that every training stage has."""
    checkpoint.save_model(model, job.out / "model.pt", {"task": "detect", "imgsz": max(job.imgsz_hw)})
    return {
        **measure(job, model),
        "parameters": parameters(model),
        "compute_gflops": 2 * conv_macs(model, job.imgsz_hw) / 1e9,
        "sparsity": masks.sparsity_of(model),
        "size_mib": (job.out / "model.pt").stat().st_size / 2**20,
        "epochs": getattr(job.config, "epochs", 0),
    }


def device(job: Job) -> str:
    """Return the torch device for everything except training: the first device of the recipe.

    Raises:
        EnvironmentLacks: Torch does not see this device.
    """
    first = job.recipe.run.device.split(",")[0]
    if first == "cpu":
        return first
    if int(first) >= torch.cuda.device_count():
        raise EnvironmentLacks(
            f"run.device={job.recipe.run.device}: torch {torch.__version__} sees no such GPU; use cpu"
        )
    return f"cuda:{first}"


def measure(job: Job, model: nn.Module, what: str = "") -> Validated:
    """Validate a torch model with the code that also evaluates every engine, and store its detections.

    Args:
        job: Job of the stage.
        model: Model to validate.
        what: Text for the progress bar.
    """
    names, most = job.dataset.names, job.recipe.data.max_det
    with (
        TorchBackend(model, names, job.imgsz_hw, device=device(job)) as backend,
        bar(f"validate {what}".strip(), len(job.dataset.val), "image") as advance,
    ):
        result = accuracy(backend, job.dataset.val, names, job.imgsz_hw, progress=advance, max_det=most)
    keep(
        job.out / "detections.npy", result["detections"], counted(most)
    )  # the report computes an interval of mAP from the stored detections
    return {"map50_95": result["map50_95"], "map50": result["map50"], "images": len(job.dataset.val)}
