"""Load and save checkpoints of detectors in the format of Ultralytics. Loading runs no code of the file."""

from __future__ import annotations

import importlib
import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.utils import _pair as pair
from ultralytics import __version__
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import ROOT, YAML, IterableSimpleNamespace
from ultralytics.utils.loss import E2EDetectLoss

from yolo_compress.errors import CompressError, CorruptArtifact, NumericsError, RecipeError
from yolo_compress.files.atomic import atomic_write, storage_errors
from yolo_compress.nets import detect, families
from yolo_compress.train import pickled

MAX_WINDOW_PX = 16  # kernel, stride, padding and factor of a layer; detectors have 5 at most


def new_model(yaml: str, names: Sequence[str], channels: int, seed: int) -> DetectionModel:
    """Return a detector with random weights. The same seed gives the same weights.

    Args:
        yaml: Name of a family's yaml, such as `yolov8n.yaml` (`families.yaml_file`).
        names: Class names in the order of their index.
        channels: Channels of the input image.
        seed: Seeds the initial weights.

    Raises:
        RecipeError: `yaml` has another name.
    """
    torch.manual_seed(seed)
    model = DetectionModel(_architecture(yaml), ch=channels, nc=len(names), verbose=False)
    return dress(model, names)


def _architecture(yaml: str) -> dict[str, object]:
    """Return the architecture from the yaml file of Ultralytics.

    The file is read by its full path. If Ultralytics gets only a name, it prefers a file of the working directory.
    """
    file, scale = families.yaml_file(yaml, ROOT / "cfg" / "models")
    return {**YAML.load(file), "scale": scale, "yaml_file": yaml}


def load_model(path: Path) -> DetectionModel:
    """Load a float32 detector from a checkpoint of Ultralytics or of this project.

    Raises:
        RecipeError: The file is missing, or is not a detector with BatchNorm (fused, segmentation, ...).
        CorruptArtifact: The file is truncated or altered, or refers to code that no checkpoint needs. Or it needs more memory than
            it has bytes, or its layers do not fit together.
        StorageError: The file cannot be read.
        NumericsError: A weight is NaN or infinite, or a running variance is negative. The message names the tensor.
    """
    model = load_any(path)
    check_loaded(model, path)
    return dress(model, list(model.names.values()))


def load_any(path: Path) -> nn.Module:
    """Load the float32 module of any checkpoint that consists of Ultralytics and torch classes.

    The attribute `names` of the module is a dictionary by class index, or missing.

    `pickled.check` reads the pickle before anything is loaded. Torch's restricted loader then loads the file, and may use only
    the classes that the pickle refers to. Ultralytics' own loader is not used, because it changes blanks and quotes in the path
    and searches the network for a missing file.

    Raises:
        RecipeError: The file does not exist.
        CorruptArtifact: See `load_model`.
        StorageError: The file cannot be read.
    """
    if not path.is_file():
        raise RecipeError(f"{path}: no such checkpoint")
    with storage_errors(path, "read"), _explained(path):
        needed = [(_resolve(name), name) for name in sorted(pickled.check(path))]
        with torch.serialization.safe_globals([*needed, *_NUMPY_TYPES]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the user cannot act on how the file was pickled
            content = torch.load(path, map_location="cpu", weights_only=True)
        model = content.get("ema") or content["model"]
        if not isinstance(model, nn.Module):
            raise TypeError(f"its model is a {type(model).__name__}")
        model = model.float().eval()
        model.args = content.get("train_args") or {}
        if not hasattr(model, "stride"):
            model.stride = torch.tensor([32.0])
        for module in model.modules():
            if hasattr(module, "inplace"):
                module.inplace = True
            elif isinstance(module, nn.Upsample) and not hasattr(module, "recompute_scale_factor"):
                module.recompute_scale_factor = None  # checkpoints of torch before 1.11
        if hasattr(model, "names"):
            model.names = _names(model.names)
        return model


_NUMPY_TYPES = [type(np.dtype(kind)) for kind in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "b1")]
_ALIASES: dict[str, object] = {  # names of older versions, and names that are not classes
    "ultralytics.yolo.utils.IterableSimpleNamespace": IterableSimpleNamespace,
    "ultralytics.nn.modules.block.Silence": nn.Identity,  # YOLOv9e
    "ultralytics.nn.tasks.YOLOv10DetectionModel": DetectionModel,
    "ultralytics.utils.loss.v10DetectLoss": E2EDetectLoss,
    "numpy.core.multiarray.scalar": np.float64(0).__reduce__()[0],
    "numpy._core.multiarray.scalar": np.float64(0).__reduce__()[0],
    pickled.METHOD: lambda owner, name: getattr(
        owner, name
    ),  # a function of our own: torch refuses the builtin by its name
    **dict.fromkeys(pickled.PATHS, PurePosixPath),
}


def _resolve(name: str) -> Any:
    """Import and return the class or function `name`, which `pickled.check` has accepted."""
    if name in _ALIASES:
        return _ALIASES[name]
    module, _, attribute = name.rpartition(".")
    resolved = getattr(importlib.import_module(module), attribute)
    if pickled.MODULES.fullmatch(name) and not (
        isinstance(resolved, type) and (issubclass(resolved, nn.Module) or resolved.__module__ == module)
    ):
        raise TypeError(f"{name} is not a class of torch or Ultralytics {__version__}")
    return resolved


def _names(names: Any) -> dict[int, str]:
    """Return the class names of a checkpoint by class index.

    Raises:
        ValueError: The indices are not 0, 1, 2, .... Or a name is not a text or a number.
    """
    listed = list(names.items()) if isinstance(names, Mapping) else list(enumerate(names))
    if [index for index, _ in sorted(listed)] != list(range(len(listed))):
        raise ValueError("its class names are not numbered from 0")
    if not all(isinstance(name, str | int | float) for _, name in listed):
        raise ValueError("one of its class names is not text")
    return {index: str(name) for index, name in sorted(listed)}


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn any exception inside the block into CorruptArtifact. A damaged checkpoint can cause every kind of exception."""
    try:
        yield
    except (CompressError, OSError, MemoryError):
        raise
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise CorruptArtifact(
            f"{path}: not a loadable YOLO checkpoint ({type(error).__name__}: {first}); nothing in it was run. "
            "Download or export it again"
        ) from error


def class_names(path: Path) -> list[str]:
    """Return the class names of a checkpoint of any task, in the order of their index. Empty if the file has none.

    Raises:
        RecipeError, CorruptArtifact: See `load_any`.
    """
    return list(getattr(load_any(path), "names", {}).values())


def check_loaded(model: nn.Module, path: Path) -> None:
    """Check that a module from a checkpoint is a detector with BatchNorm and finite weights.

    Raises:
        RecipeError, NumericsError: See `load_model`.
    """
    layers = getattr(model, "model", None)
    last = layers[-1] if isinstance(layers, nn.Sequential) and len(layers) else model
    if type(model) is not DetectionModel or not detect.is_detect(last):
        raise RecipeError(
            f"{path}: the head is {type(last).__name__}, expected Detect: only {families.names()} detectors can be compressed"
        )
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        raise RecipeError(f"{path}: a fused checkpoint (no BatchNorm left); give the one saved before `fuse()`/export")
    check_finite(model, str(path))
    with _explained(path):
        _check_runs(model)


def _check_runs(model: DetectionModel) -> None:
    """Run the model once on a black image of 64 px, to find layers that do not fit together before a stage does."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.MaxPool2d):
            sizes = [*pair(module.kernel_size), *pair(module.stride), *pair(module.dilation)]
            if not all(1 <= size <= MAX_WINDOW_PX for size in sizes) or max(pair(module.padding)) > MAX_WINDOW_PX:
                raise ValueError(
                    f"{name} has kernel, stride and dilation {sizes} and padding {module.padding}, "
                    f"expected {MAX_WINDOW_PX} at most"
                )
        if isinstance(module, nn.Upsample) and not 1 <= max(pair(module.scale_factor)) <= MAX_WINDOW_PX:
            raise ValueError(f"{name} upsamples by {module.scale_factor}, expected 1 to {MAX_WINDOW_PX}")
    if not isinstance(model.stride, torch.Tensor):
        raise TypeError("its stride is not a tensor")
    head = model.model[-1]
    before = dict(vars(head))  # Detect stores the anchors of the last image
    try:
        with torch.no_grad():
            _, raw = model(torch.zeros(1, image_channels(model), 64, 64))
        for outputs in detect.by_branch(raw).values():
            if outputs["scores"].shape[1] != len(model.names):
                raise ValueError(f"{outputs['scores'].shape[1]} scores an anchor for {len(model.names)} class names")
    finally:
        vars(head).clear()
        vars(head).update(before)


def check_finite(model: nn.Module, where: str) -> None:
    """Check that all tensors are finite and no running variance is negative.

    Raises:
        NumericsError: A tensor is not. The message names the first such tensor.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NumericsError(f"{where}: {name} holds NaN or infinity; the checkpoint is not usable")
        if name.endswith("running_var") and (tensor < 0).any():
            raise NumericsError(f"{where}: {name} is negative; the checkpoint is not usable")


def save_model(model: nn.Module, path: Path, train_args: Mapping[str, object] | None = None) -> None:
    """Write a float32 checkpoint that Ultralytics loads, also with `ULTRALYTICS_SAFE_LOAD=1`.

    The modules are pickled, so the file contains the widths of a pruned model. It contains no path, git origin or host.
    """
    model = deepcopy(model).cpu().float().eval()
    for attribute in ("criterion", "pt_path", "class_weights"):
        model.__dict__.pop(attribute, None)
    model.args = dict(train_args or {})
    head = model.model[-1]
    # Detect sets the first three for the last image, and validation sets the others. A run that is resumed after its last epoch
    # has no validation, so drop them always: Ultralytics' `nms=False` chooses the one-to-one branches of a checkpoint.
    for attribute in ("anchors", "strides", "shape", "_end2end", "max_det", "agnostic_nms"):
        head.__dict__.pop(attribute, None)
    model.stride = head.stride  # the same tensor, as in a new model; training makes a copy
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    contiguous(model)
    foreign = {
        type(m).__module__ for m in model.modules() if not type(m).__module__.startswith(("ultralytics.", "torch."))
    }
    if foreign:
        raise AssertionError(
            f"a stock checkpoint may contain only Ultralytics and torch classes, found {sorted(foreign)}"
        )
    buffer = io.BytesIO()
    torch.save(
        {
            "epoch": -1,
            "best_fitness": None,
            "model": model,
            "ema": None,
            "updates": None,
            "optimizer": None,
            "train_args": dict(train_args or {}),
            "version": __version__,
            "license": "AGPL-3.0 (https://ultralytics.com/license)",
        },
        buffer,
    )
    atomic_write(path, buffer.getvalue())


def contiguous(model: nn.Module) -> nn.Module:
    """Make every parameter and buffer contiguous, in place, with the strides of a new tensor of its shape.

    Ultralytics trains channels_last on CUDA. Versions before 8.4 fuse layers with `.view()`, which fails on such strides.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.stride() != torch.empty(tensor.shape, device="meta").stride():
            tensor.data = torch.empty_like(tensor, memory_format=torch.contiguous_format).copy_(tensor.detach())
    return model


def widths(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the (input, output) channels of every convolution by module name. Training must not change them."""
    return {n: (m.in_channels, m.out_channels) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}


def check_classes(model: DetectionModel, names: Sequence[str], what: str) -> None:
    """Check that model and data set have the same class names, in the same order.

    Raises:
        RecipeError: The names differ. The message lists the differences and starts with `what`.
    """
    have = [str(model.names[i]) for i in range(len(model.names))]
    want = list(names)
    if have == want:
        return
    pairs = zip_longest(have, want, fillvalue="nothing")
    diff = [
        f"{i}: {mine} in the model, {theirs} in the data" for i, (mine, theirs) in enumerate(pairs) if mine != theirs
    ]
    shown = "; ".join(diff[:8]) + (f"; ... {len(diff) - 8} more" if len(diff) > 8 else "")
    raise RecipeError(
        f"{what} knows {len(have)} classes, the data set has {len(want)}; names and order must agree. They differ at {shown}"
    )


def image_channels(model: nn.Module) -> int:
    """Return the number of image channels that the first convolution expects."""
    return next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))


def dress(model: DetectionModel, names: Sequence[str]) -> DetectionModel:
    """Set the attributes that the losses and exporters of Ultralytics expect, in place, and make all parameters trainable."""
    model.names = dict(enumerate(map(str, names)))
    model.nc = len(names)
    model.task = "detect"
    model.args = get_cfg(overrides={"task": "detect"})
    model.__dict__.pop("pt_path", None)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    assert isinstance(model.args, SimpleNamespace) and math.isfinite(float(model.stride.max()))
    return model
