"""Registry of model families. The functions find the family of a model, check that the model can be pruned, and give its data flow.

A family is a set of architectures with the same layers, such as YOLOv8 n to x. To add a family, write a file that defines a
`Family` and add a row to `FAMILIES`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from yolo_compress.errors import NumericsError, RecipeError
from yolo_compress.nets import detect
from yolo_compress.nets.factors import check_whole
from yolo_compress.nets.family import Family
from yolo_compress.nets.flow import IMAGES, FeatureMap, Flow
from yolo_compress.nets.yolo11 import YOLO11
from yolo_compress.nets.yolo26 import YOLO26
from yolo_compress.nets.yolov8 import YOLOV8

FAMILIES: dict[str, Family] = {"yolov8": YOLOV8, "yolo11": YOLO11, "yolo26": YOLO26}


def family_of(model: nn.Module, doing: str) -> Family:
    """Return the family whose layer classes include all layer classes of a model.

    Args:
        model: Stock model; may be pruned, fused or fake-quantised.
        doing: Verb at the start of the error message: "prune", "quantise", "export" or "distill".

    Raises:
        RecipeError: No family has all layers of the model. The message names the first unknown layer.
    """
    supported = "supported are " + "; ".join(f"{row.name} detection models: {row.made_of}" for row in FAMILIES.values())
    layers = getattr(model, "model", None)
    if not isinstance(layers, nn.Sequential) or len(layers) == 0:
        raise RecipeError(
            f"{doing}: {type(model).__name__} is not an Ultralytics model with a `model` sequence; {supported}"
        )
    farthest = 0
    for family in FAMILIES.values():
        unknown = family.first_unknown_layer(layers)
        if unknown is None:
            return family
        farthest = max(farthest, unknown)
    kind = type(layers[farthest]).__name__
    if farthest == len(layers) - 1:
        kind += " head without NMS" if detect.is_end_to_end(layers[farthest]) else " head"
    raise RecipeError(f"{doing}: model.{farthest} is a {kind}; {supported}")


def check_prunable(model: nn.Module) -> Flow:
    """Return the data flow of a model, after a check that channels of every block can be removed and all weights are finite.

    Raises:
        RecipeError: A block, the head or the model is of an unknown class, a convolution is fused, quantised, wrapped or
            factorised, or a block has connections that the family does not support.
        NumericsError: A weight or BatchNorm statistic holds NaN or infinity.
    """
    family = family_of(model, "prune")
    check_whole(model)
    for index, layer in enumerate(model.model):  # type: ignore[arg-type]
        family.layers[type(layer)].check(f"model.{index}", layer)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not bool(torch.isfinite(torch.stack(torch.aminmax(tensor.detach()))).all()):
            raise NumericsError(f"prune: {name} holds NaN or infinity; take weights from an earlier epoch")
    return flow_of(model, "prune")


def flow_of(model: nn.Module, doing: str) -> Flow:
    """Return the data flow of a model: what each convolution reads, which tensors meet, which channels belong together.

    The layers are visited in the order of Ultralytics' `forward`.

    Raises:
        RecipeError: The family is unknown (see `family_of`), or a block has connections that the family does not support.
    """
    family, flow = family_of(model, doing), Flow(model)
    images = flow.new(IMAGES)
    made: list[FeatureMap] = []  # output tensor of each layer
    for index, layer in enumerate(model.model):  # type: ignore[arg-type]
        given = layer.f if isinstance(layer.f, (list, tuple)) else [layer.f]
        sources = [made[index + f] if f < 0 and index + f >= 0 else images if f < 0 else made[f] for f in given]
        try:
            made.append(family.layers[type(layer)].wire(flow, f"model.{index}", layer, sources))
        except RecipeError as error:
            raise RecipeError(f"{doing}: {error}") from None
    return flow


def refresh_attributes(model: nn.Module) -> None:
    """Update the attributes that Ultralytics derives from tensor shapes, in place, after channels were removed."""
    family_of(model, "prune").refresh(model)
    for layer in model.model:  # type: ignore[union-attr]
        if hasattr(layer, "np"):  # the count of parameters
            layer.np = sum(p.numel() for p in layer.parameters())


def names() -> str:
    """Return the names of all families for messages: "YOLOv8, YOLO11 and YOLO26"."""
    *first, last = (family.name for family in FAMILIES.values())
    return f"{', '.join(first)} and {last}"


def backbone(model: nn.Module) -> list[str]:
    """Return the names of the layers before the first upsampling."""
    layers = list(model.model)  # type: ignore[arg-type]
    ends = [index for index, layer in enumerate(layers) if isinstance(layer, nn.Upsample)]
    return [f"model.{index}" for index in range(ends[0] if ends else len(layers) - 1)]


def yaml_layers() -> set[str]:
    """Return the layer names that Ultralytics' yaml files of supported models use before the head, such as `C2f`."""
    return set[str]().union(*(family.yaml_layers for family in FAMILIES.values()))


def yaml_file(name: str, folder: Path) -> tuple[Path, str]:
    """Return the path of Ultralytics' yaml file for a model name, and the size of the model ("n" to "x").

    Args:
        name: Name in the recipe, such as `yolov8n.yaml`.
        folder: Ultralytics' folder `cfg/models`.

    Raises:
        RecipeError: No family has a yaml file of this name.
    """
    for family in FAMILIES.values():
        if found := family.yaml.fullmatch(name):
            return folder / family.yaml_file.format(variant=found[2]), found[1]
    names = ", ".join(family.yaml_names for family in FAMILIES.values())
    raise RecipeError(f"model: got {name!r}, expected {names}")
