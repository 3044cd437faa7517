"""YOLOv8 checkpoints in and out of the stock Ultralytics format, with nothing of the file executed and nothing silently changed."""

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

MAX_WINDOW_PX = 16  # kernel, stride, padding and factor of a layer; YOLOv8 has 5 at most


def new_model(yaml: str, names: Sequence[str], channels: int, seed: int) -> DetectionModel:
    """A randomly initialised detector, the same one for the same seed.

    Args:
        yaml: `yolov8{n,s,m,l,x}.yaml`.
        names: Class names in index order.
        channels: Image channels.
        seed: Seeds the initial weights.

    Raises:
        RecipeError: Another name.
    """
    torch.manual_seed(seed)
    model = DetectionModel(_architecture(yaml), ch=channels, nc=len(names), verbose=False)
    return dress(model, names)


def _architecture(yaml: str) -> dict[str, object]:
    """The model dict of Ultralytics' own file. By name, it would take a file of the working directory first."""
    file, scale = families.yaml_file(yaml, ROOT / "cfg" / "models")
    return {**YAML.load(file), "scale": scale, "yaml_file": yaml}


def load_model(path: Path) -> DetectionModel:
    """A float32 stock detector from a checkpoint written by Ultralytics or by us.

    Raises:
        RecipeError: The file is missing, or is not a detector with BatchNorm (fused, segmentation, ...).
        CorruptArtifact: Truncated or altered; it would run what no checkpoint needs (which is not run) or take more memory
            than its bytes; or its layers do not fit together.
        StorageError: It cannot be read.
        NumericsError: A weight is NaN or infinite, or a running variance negative; names the layer.
    """
    model = load_any(path)
    check_loaded(model, path)
    return dress(model, list(model.names.values()))


def load_any(path: Path) -> nn.Module:
    """The float32 module of any checkpoint of Ultralytics and torch classes; `names` is a dictionary by index, or missing.

    What the file would do is read before anything of it is loaded (`pickled.check`), and then done by torch's restricted
    loader, for the classes that the file needs alone. Ultralytics' own loader would change blanks and quotes of the path,
    and ask the network for a file that is not there.

    Raises:
        RecipeError: No such file.
        CorruptArtifact: See `load_model`.
        StorageError: It cannot be read.
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
_ALIASES: dict[str, object] = {  # names of older versions, and those of no class
    "ultralytics.yolo.utils.IterableSimpleNamespace": IterableSimpleNamespace,
    "ultralytics.nn.modules.block.Silence": nn.Identity,  # YOLOv9e
    "ultralytics.nn.tasks.YOLOv10DetectionModel": DetectionModel,
    "ultralytics.utils.loss.v10DetectLoss": E2EDetectLoss,
    "numpy.core.multiarray.scalar": np.float64(0).__reduce__()[0],
    "numpy._core.multiarray.scalar": np.float64(0).__reduce__()[0],
    pickled.METHOD: lambda owner, name: getattr(owner, name),  # a copy: torch refuses the builtin by its name
    **dict.fromkeys(pickled.PATHS, PurePosixPath),
}


def _resolve(name: str) -> Any:
    """What a name that `pickled.check` let through stands for here."""
    if name in _ALIASES:
        return _ALIASES[name]
    module, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(module), attribute)
    if pickled.MODULES.fullmatch(name) and not (
        isinstance(found, type) and (issubclass(found, nn.Module) or found.__module__ == module)
    ):
        raise TypeError(f"{name} is no class of torch or Ultralytics {__version__}")
    return found


def _names(names: Any) -> dict[int, str]:
    """Class names by index."""
    listed = list(names.items()) if isinstance(names, Mapping) else list(enumerate(names))
    if [index for index, _ in sorted(listed)] != list(range(len(listed))):
        raise ValueError("its class names are not numbered from 0")
    if not all(isinstance(name, str | int | float) for _, name in listed):
        raise ValueError("a class name of it is no text")
    return {index: str(name) for index, name in sorted(listed)}


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Whatever a file of others makes go wrong is the file's fault: loaders raise anything."""
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
    """The classes that a checkpoint of any task knows, in index order; empty where it does not say.

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
            f"{path}: the head is {type(last).__name__}, expected Detect: only YOLOv8 detectors can be compressed"
        )
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        raise RecipeError(f"{path}: a fused checkpoint (no BatchNorm left); give the one saved before `fuse()`/export")
    check_finite(model, str(path))
    with _explained(path):
        _check_runs(model)


def _check_runs(model: DetectionModel) -> None:
    """Detect once in an empty image of 64 px, so that layers that do not fit together are found here and not in a stage."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.MaxPool2d):
            sizes = [*pair(module.kernel_size), *pair(module.stride), *pair(module.dilation)]
            if not all(1 <= size <= MAX_WINDOW_PX for size in sizes) or max(pair(module.padding)) > MAX_WINDOW_PX:
                raise ValueError(f"{name} has a window of {sizes} px")
        if isinstance(module, nn.Upsample) and not 1 <= max(pair(module.scale_factor)) <= MAX_WINDOW_PX:
            raise ValueError(f"{name} enlarges {module.scale_factor} times")
    if not isinstance(model.stride, torch.Tensor):
        raise TypeError("it has no strides")
    head = model.model[-1]
    before = dict(vars(head))  # it keeps the anchors of the last image
    try:
        with torch.no_grad():
            scores = model(torch.zeros(1, image_channels(model), 64, 64))[0]
        if scores.shape[1] != 4 + len(model.names):
            raise ValueError(f"{scores.shape[1] - 4} scores an anchor for {len(model.names)} class names")
    finally:
        vars(head).clear()
        vars(head).update(before)


def check_finite(model: nn.Module, where: str) -> None:
    """Raises NumericsError naming the first tensor that is NaN, infinite or a negative variance."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NumericsError(f"{where}: {name} holds NaN or infinity; the checkpoint is not usable")
        if name.endswith("running_var") and (tensor < 0).any():
            raise NumericsError(f"{where}: {name} is negative; the checkpoint is not usable")


def save_model(model: nn.Module, path: Path, train_args: Mapping[str, object] | None = None) -> None:
    """Write a float32 checkpoint that any `ultralytics` loads, also under `ULTRALYTICS_SAFE_LOAD=1`.

    Widths live in the pickled modules, so a pruned net keeps them; paths, git origin and host never enter the file.
    """
    model = deepcopy(model).cpu().float().eval()
    for attribute in ("criterion", "pt_path", "class_weights"):
        model.__dict__.pop(attribute, None)
    model.args = dict(train_args or {})
    head = model.model[-1]
    passing = ["anchors", "strides", "shape"]  # of the last image Detect decoded; the file is one of the weights alone
    if not getattr(head, "end2end", False):
        passing.append(
            "_end2end"
        )  # validation writes the default down; a run resumed after its last epoch has had none
    for attribute in passing:
        head.__dict__.pop(attribute, None)
    model.stride = head.stride  # one tensor, as in a new net; training makes a copy of it
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    contiguous(model)
    foreign = {
        type(m).__module__ for m in model.modules() if not type(m).__module__.startswith(("ultralytics.", "torch."))
    }
    if foreign:
        raise AssertionError(f"a stock checkpoint may hold only Ultralytics and torch classes, found {sorted(foreign)}")
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
    """Give every parameter and buffer the strides of a new tensor of its shape, in place.

    Ultralytics trains channels_last on CUDA. Versions before 8.4 fuse layers with `.view()`, which fails on such strides.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.stride() != torch.empty(tensor.shape, device="meta").stride():
            tensor.data = torch.empty_like(tensor, memory_format=torch.contiguous_format).copy_(tensor.detach())
    return model


def widths(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(input, output) channels of every convolution by module name: what a pruned model must keep through a run."""
    return {n: (m.in_channels, m.out_channels) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}


def check_classes(model: DetectionModel, names: Sequence[str], what: str) -> None:
    """Raises RecipeError with a diff when a model's classes are not the data set's, by name and order."""
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
    """Channels of the images the stem takes."""
    return next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))


def dress(model: DetectionModel, names: Sequence[str]) -> DetectionModel:
    """The attributes that Ultralytics' losses and exporters expect on a module."""
    model.names = dict(enumerate(map(str, names)))
    model.nc = len(names)
    model.task = "detect"
    model.args = get_cfg(overrides={"task": "detect"})
    model.__dict__.pop("pt_path", None)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    assert isinstance(model.args, SimpleNamespace) and math.isfinite(float(model.stride.max()))
    return model
