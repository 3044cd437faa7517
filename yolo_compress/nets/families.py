"""The registry of families, and what is asked of any model: its family, whether it can be pruned, its wiring.

A new family is a file with a `Family` in it and a row here.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from yolo_compress.errors import NumericsError, RecipeError
from yolo_compress.nets.family import Family
from yolo_compress.nets.flow import IMAGES, Flow
from yolo_compress.nets.yolov8 import YOLOV8

FAMILIES: dict[str, Family] = {"yolov8": YOLOV8}


def family_of(model: nn.Module, doing: str) -> Family:
    """The family of a model, by the classes of its layers.

    Args:
        model: Stock model, pruned or not, fused or not, fake-quantised or not.
        doing: What it is needed for, the first word of the error: "prune", "quantise", "export", "distill".

    Raises:
        RecipeError: No family has all its layers; names the first layer that is not known.
    """
    supported = f"supported are {'; '.join(family.made_of for family in FAMILIES.values())}"
    layers = getattr(model, "model", None)
    if not isinstance(layers, nn.Sequential) or len(layers) == 0:
        raise RecipeError(
            f"{doing}: {type(model).__name__} is not an Ultralytics model with a `model` sequence; {supported}"
        )
    farthest = 0
    for family in FAMILIES.values():
        strange = family.strange(layers)
        if strange is None:
            return family
        farthest = max(farthest, strange)
    kind = type(layers[farthest]).__name__ + (" head" if farthest == len(layers) - 1 else "")
    raise RecipeError(f"{doing}: model.{farthest} is a {kind}; {supported}")


def check_prunable(model: nn.Module) -> Family:
    """Check that the channels of every block of a detector can be selected and that its weights are finite.

    Returns:
        The family of the model.

    Raises:
        RecipeError: Another kind of block, head or model, or a fused, quantised or wrapped convolution; names it.
        NumericsError: NaN or infinity in a weight or BatchNorm statistic; names the tensor.
    """
    family = family_of(model, "prune")
    for index, layer in enumerate(model.model):  # type: ignore[arg-type]
        family.layers[type(layer)].check(f"model.{index}", layer)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not bool(torch.isfinite(torch.stack(torch.aminmax(tensor.detach()))).all()):
            raise NumericsError(f"prune: {name} holds NaN or infinity; take weights from an earlier epoch")
    return family


def flow_of(model: nn.Module) -> Flow:
    """The wiring of a model: follows its layers as Ultralytics' `forward` does.

    Raises:
        RecipeError: See `family_of`; or a block is wired in a way that its family does not have.
    """
    family, flow = family_of(model, "quantise"), Flow()
    flow.new(IMAGES)
    made: list[str] = []  # the tensor that each layer gives
    for index, layer in enumerate(model.model):  # type: ignore[arg-type]
        given = layer.f if isinstance(layer.f, (list, tuple)) else [layer.f]
        sources = [made[index + f] if f < 0 and index + f >= 0 else IMAGES if f < 0 else made[f] for f in given]
        made.append(family.layers[type(layer)].wire(flow, f"model.{index}", layer, sources))
    return flow


def refresh_attributes(model: nn.Module, family: Family) -> None:
    """Bring what Ultralytics stores beside the tensors in line with their shapes, in place, after channels went."""
    family.refresh(model)
    for layer in model.model:  # type: ignore[union-attr]
        if hasattr(layer, "np"):  # the count of parameters
            layer.np = sum(p.numel() for p in layer.parameters())


def strides() -> list[list[int]]:
    """The strides that a supported model may have."""
    return [list(family.strides) for family in FAMILIES.values()]


def yaml_layers() -> set[str]:
    """Names of the layers before the head in the yaml files of supported models."""
    return set[str]().union(*(family.yaml_layers for family in FAMILIES.values()))


def yaml_file(name: str, folder: Path) -> tuple[Path, str]:
    """The file of Ultralytics that a yaml name such as `yolov8n.yaml` stands for, and the scale in the name.

    Args:
        name: As a recipe gives it.
        folder: Ultralytics' `cfg/models`.

    Raises:
        RecipeError: No family has this name.
    """
    for family in FAMILIES.values():
        if found := family.yaml.fullmatch(name):
            return folder / family.yaml_file.format(variant=found[2]), found[1]
    names = ", ".join(family.yaml_names for family in FAMILIES.values())
    raise RecipeError(f"model: got {name!r}, expected {names}")
