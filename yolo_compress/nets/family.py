"""Types that describe a family of detectors: its layer classes, and its functions for pruning, distillation and quantisation."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from yolo_compress.nets.flow import FeatureMap, Flow


class Layer(NamedTuple):
    """Functions for one layer class, where a layer is an entry of `model.model`.

    Attributes:
        check: (name, layer) -> None. Raises RecipeError if channels of the layer cannot be removed.
        wire: (flow, name, layer, input tensors) -> output tensor. Adds the operations of the layer to the flow.
    """

    check: Callable[[str, Any], None]
    wire: Callable[[Flow, str, Any, list[FeatureMap]], FeatureMap]


@dataclass(frozen=True)
class Family:
    """Properties and functions of an architecture that pruning, quantisation, export, distillation and training use.

    Attributes:
        name: Name for people: "YOLOv8".
        made_of: Its layers for error messages: "Conv, C2f, ...".
        layers: Exact class of a layer -> the functions for this class. The class of the head is included.
        head: Class of the last layer.
        fits: (head) -> whether a head of this class belongs to the family.
        refresh: Updates the attributes that depend on tensor shapes, in place, after channels were removed.
        for_export: Prepares the layers of a copy for tracing, in place. `detect.for_export` prepares the head.
        yaml_layers: Names of the layers before the head in Ultralytics' yaml files.
        yaml: Pattern of the yaml names that can be trained from scratch. Group 1 is the size, group 2 the variant.
        yaml_file: Path in Ultralytics' `cfg/models`, without the size and with the placeholder `{variant}`.
        yaml_names: The yaml names for error messages: "yolov8n.yaml to yolov8x.yaml".
    """

    name: str
    made_of: str
    layers: Mapping[type[nn.Module], Layer]
    head: type[nn.Module]
    refresh: Callable[[nn.Module], None]
    for_export: Callable[[nn.Module], None]
    yaml_layers: frozenset[str]
    yaml: re.Pattern[str]
    yaml_file: str
    yaml_names: str
    fits: Callable[[nn.Module], bool] = lambda head: True

    def first_unknown_layer(self, layers: nn.Sequential) -> int | None:
        """Return the index of the first layer whose class is not in this family, or None if all classes are."""
        last = len(layers) - 1
        for index, layer in enumerate(layers):
            known = (
                type(layer) is self.head and self.fits(layer)
                if index == last
                else type(layer) in self.layers and type(layer) is not self.head
            )
            if not known:
                return index
        return None
