"""YOLOv8 checkpoints in and out of the stock Ultralytics format, with nothing executed and nothing silently changed."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from ultralytics import __version__
from ultralytics.cfg import get_cfg
from ultralytics.nn.modules import Detect
from ultralytics.nn.tasks import DetectionModel, load_checkpoint
from ultralytics.utils import ROOT, YAML, downloads

from yolo_compress.artifact import atomic_write
from yolo_compress.errors import CorruptArtifact, NumericsError, RecipeError


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


def _architecture(yaml: str) -> dict[str, Any]:
    """The model dict of Ultralytics' own file. By name, it would take a file of the working directory first."""
    name = re.fullmatch(r"yolov8([nsmlx])([\w-]*)\.yaml", yaml)
    if name is None:
        raise RecipeError(f"model: got {yaml!r}, expected yolov8n.yaml to yolov8x.yaml")
    layers = YAML.load(ROOT / "cfg" / "models" / "v8" / f"yolov8{name[2]}.yaml")
    return {**layers, "scale": name[1], "yaml_file": yaml}


@contextmanager
def _opens(path: Path) -> Iterator[str]:
    """Yields a name under which Ultralytics' `load_checkpoint` opens `path`.

    Of a path itself it strips apostrophes and outer spaces, so that `it's.pt` loads `its.pt`. It reads `?` and `%` as in a URL,
    downloads what it does not find, and deletes a damaged file that has the bare name of an official one (ultralytics 8.4).
    """
    original, downloads.attempt_download_asset = downloads.attempt_download_asset, lambda name: str(path)
    try:
        yield "checkpoint.pt"
    finally:
        downloads.attempt_download_asset = original


def load_model(path: Path) -> DetectionModel:
    """A float32 stock detector from a checkpoint written by Ultralytics or by us.

    Raises:
        RecipeError: The file is missing, or is not a detector with BatchNorm (fused, segmentation, ...).
        CorruptArtifact: Truncated or altered, or it asks for classes beyond Ultralytics' allow-list (which are not run).
        NumericsError: A weight is NaN or infinite, or a running variance negative; names the layer.
    """
    model = load_any(path)
    check_loaded(model, path)
    names = model.names
    return dress(model, [names[i] for i in range(len(names))] if isinstance(names, Mapping) else names)


def load_any(path: Path) -> nn.Module:
    """The float32 module of any checkpoint of Ultralytics' allow-list of classes.

    Raises:
        RecipeError: No such file.
        CorruptArtifact: See `load_model`.
    """
    if not path.is_file():
        raise RecipeError(f"{path}: no such checkpoint")
    try:
        with warnings.catch_warnings(), _opens(path) as name:
            warnings.filterwarnings(
                "ignore", message="Detected pickle protocol"
            )  # refused or not, the user cannot act on it
            model, _ = load_checkpoint(name)
    except (
        TypeError,
        RuntimeError,
        EOFError,
        KeyError,
        AttributeError,
        ModuleNotFoundError,
        ValueError,
        OSError,
    ) as error:
        first = str(error).strip().split("\n")[0]
        raise CorruptArtifact(
            f"{path}: not a loadable YOLO checkpoint ({type(error).__name__}: {first}); nothing in it was run. "
            "Download or export it again"
        ) from error
    return model


def class_names(path: Path) -> list[str]:
    """The classes that a checkpoint of any task knows, in index order; empty where it does not say.

    Raises:
        RecipeError, CorruptArtifact: See `load_any`.
    """
    names = getattr(load_any(path), "names", ())
    return [str(name) for name in (names.values() if isinstance(names, Mapping) else names)]


def check_loaded(model: nn.Module, path: Path) -> None:
    """Check that a module from a checkpoint is a detector with BatchNorm and finite weights.

    Raises:
        RecipeError, NumericsError: See `load_model`.
    """
    if not isinstance(model, DetectionModel) or type(model.model[-1]) is not Detect:
        head = type(model.model[-1]).__name__ if hasattr(model, "model") else type(model).__name__
        raise RecipeError(f"{path}: the head is {head}, expected Detect: only YOLOv8 detectors can be compressed")
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        raise RecipeError(f"{path}: a fused checkpoint (no BatchNorm left); give the one saved before `fuse()`/export")
    check_finite(model, str(path))


def check_finite(model: nn.Module, where: str) -> None:
    """Raises NumericsError naming the first tensor that is NaN, infinite or a negative variance."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NumericsError(f"{where}: {name} holds NaN or infinity; the checkpoint is not usable")
        if name.endswith("running_var") and (tensor < 0).any():
            raise NumericsError(f"{where}: {name} is negative; the checkpoint is not usable")


def save_model(model: nn.Module, path: Path, train_args: Mapping[str, Any] | None = None) -> None:
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
