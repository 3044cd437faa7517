"""Transfer learning: load a checkpoint with other classes as the start of a detector for new classes."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.nn.tasks import DetectionModel, parse_model

from yolo_compress.errors import RecipeError
from yolo_compress.nets import detect, families
from yolo_compress.train.checkpoint import check_loaded, dress, image_channels, load_any

MAX_LAYERS, MAX_REPEATS = 64, 64  # YOLOv8x with four detection levels has 29 layers and 6 repeats


@dataclass(frozen=True)
class Taken:
    """Numbers of tensors, parameters and classes of a new model that came from the checkpoint.

    Attributes:
        tensors: Number of tensors loaded.
        of_tensors: Number of tensors of the new model.
        parameters: Number of parameters loaded.
        of_parameters: Number of parameters of the new model.
        classes: Class names of the new model that the checkpoint has too.
        same: Whether the class names of checkpoint and new model are equal and in the same order.
    """

    tensors: int
    of_tensors: int
    parameters: int
    of_parameters: int
    classes: tuple[str, ...]
    same: bool


def load_pretrained(
    path: Path, names: Sequence[str], seed: int, detection_part: bool = False
) -> tuple[DetectionModel, Taken]:
    """Load a float32 detector for the classes `names` from a checkpoint with any classes.

    All tensors are loaded, except the outputs of classes that the checkpoint does not have. The class branch keeps the width of the
    checkpoint, as in Ultralytics' `DetectionModel.load`. Classes match by name. Case and outer blanks are ignored. Outputs of new
    classes start at random, with the biases of Ultralytics' `bias_init`.

    Args:
        path: Checkpoint of any classes.
        names: Class names of the data set in the order of their index.
        seed: Seeds the outputs of new classes.
        detection_part: Load backbone, neck, box and class branches of a segmentation, pose or oriented-box checkpoint.

    Raises:
        RecipeError: The checkpoint is not a detector, and `detection_part` is false or impossible. See also `load_model`.
        CorruptArtifact, NumericsError: See `load_model`.
    """
    model = load_any(path)
    head = model.model[-1] if hasattr(model, "model") else model
    if detect.extends_detect(head):
        if not detection_part:
            raise RecipeError(
                f"{path}: a checkpoint for {getattr(model, 'task', None) or 'another task'} (head {type(head).__name__}), "
                "expected a detector; set detection_part=true in the same section to load only its detection part"
            )
        model = _detection_part(model, path)
    check_loaded(model, path)
    return _with_classes(model, names, seed)


@torch.no_grad()
def _with_classes(model: DetectionModel, names: Sequence[str], seed: int) -> tuple[DetectionModel, Taken]:
    """Replace the class outputs of the model by outputs for `names`, in place."""
    known = {str(name).strip().lower(): index for index, name in model.names.items()}
    rows = {i: known[name.strip().lower()] for i, name in enumerate(names) if name.strip().lower() in known}
    same = list(model.names.values()) == list(names)
    head = model.model[-1]
    old = [branch[-1] for branch in detect.class_branches(model)]
    boxes = [branch[-1].bias.detach().clone() for branch in detect.box_branches(model)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for branch, conv in zip(detect.class_branches(model), old, strict=True):
            branch[-1] = nn.Conv2d(conv.in_channels, len(names), 1)
    head.nc, head.no = len(names), len(names) + 4 * head.reg_max
    head.bias_init()  # for the classes; it also resets the biases of the boxes
    for branch, bias in zip(detect.box_branches(model), boxes, strict=True):
        branch[-1].bias.copy_(bias)
    for branch, conv in zip(detect.class_branches(model), old, strict=True):
        for mine, theirs in rows.items():
            branch[-1].weight[mine], branch[-1].bias[mine] = conv.weight[theirs], conv.bias[theirs]
    if isinstance(getattr(model, "yaml", None), dict):
        model.yaml["nc"] = len(names)
    fresh = 0 if len(rows) == len(names) else 2 * len(old)
    tensors = len(model.state_dict())
    parameters = sum(p.numel() for p in model.parameters())
    new = (len(names) - len(rows)) * sum(conv.in_channels + 1 for conv in old)
    taken = Taken(tensors - fresh, tensors, parameters - new, parameters, tuple(names[i] for i in rows), same)
    return dress(model, names), taken


def _detection_part(model: nn.Module, path: Path) -> DetectionModel:
    """Return a plain detector with the classes and the detection branches of the checkpoint.

    The layers come from the yaml in the checkpoint, which is not trusted. So only layers of known families are built, first on the
    meta device, which takes no memory. If the shapes differ from the tensors of the checkpoint, nothing is allocated.
    """
    have = model.state_dict()
    try:
        yaml = _stock(model.yaml)
        first, count = image_channels(model), len(model.names)
        with torch.device("meta"):
            want = nn.ModuleDict({"model": parse_model(deepcopy(yaml) | {"nc": count}, first, False)[0]}).state_dict()
        missing = [name for name, tensor in want.items() if name not in have or have[name].shape != tensor.shape]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(want)} tensors do not fit a stock detector, the first is {missing[0]}"
            )
        part = DetectionModel(yaml, ch=first, nc=count, verbose=False).eval()
    except Exception as error:  # Ultralytics raises anything at layers that do not fit together
        raise RecipeError(f"{path}: its detection part cannot be loaded: {error}") from error
    part.load_state_dict({name: have[name] for name in want})
    part.names = dict(model.names)
    return part


def _stock(yaml: dict[str, Any]) -> dict[str, Any]:
    """Return the yaml of a checkpoint, with the head of a detector in place of its own.

    Raises:
        ValueError: A layer or scale is not one of a known family, or there are more layers than any of them has.
    """
    rows = [*yaml["backbone"], *yaml["head"]]
    for start, repeats, kind, arguments in rows[:-1]:
        known = kind in families.yaml_layers() and type(repeats) is int and 1 <= repeats <= MAX_REPEATS
        if not known or any(item not in ("nearest", True, False) and not 0 < item <= 5 for item in arguments[1:]):
            raise ValueError(f"{repeats} x {kind} of {arguments} from {start}: not a layer of {families.names()}")
    if len(rows) > MAX_LAYERS or sum("Upsample" in kind for _, _, kind, _ in rows) > 4:
        raise ValueError(f"{len(rows)} layers, more than any {families.names()} has")
    kept = {
        key: yaml[key]
        for key in ("scale", "scales", "depth_multiple", "width_multiple", "max_channels", "end2end", "reg_max")
        if key in yaml
    }
    if type(kept.get("end2end", False)) is not bool or kept.get("reg_max", 16) not in (1, 16):
        raise ValueError(f"end2end {kept.get('end2end')} with reg_max {kept.get('reg_max')}: not a head of a detector")
    if any(not 0 < factor <= 4 for factor in [row for rows in kept.get("scales", {}).values() for row in rows[:2]]):
        raise ValueError(f"scales {kept['scales']}: expected factors above 0, up to 4")
    head = [*yaml["head"][:-1], [*yaml["head"][-1][:2], detect.NAME, ["nc"]]]
    return deepcopy({**kept, "nc": 1, "backbone": yaml["backbone"], "head": head})
