"""What is known of a family of detectors: a table of its layers and what else the methods ask about it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from yolo_compress.nets.flow import Flow


class Layer(NamedTuple):
    """One kind of layer of `model.model`.

    Attributes:
        check: Takes name and layer; raises RecipeError, naming the module, if channels of it cannot be selected.
        wire: Takes flow, name, layer and the tensors that it reads; notes what it does and returns the tensor that it makes.
    """

    check: Callable[[str, Any], None]
    wire: Callable[[Flow, str, Any, list[str]], str]


class Part(NamedTuple):
    """A Conv block of the split view: output channels of a block of the stock model, from `offset` on."""

    stock: str
    offset: int


@dataclass(frozen=True)
class Family:
    """Everything that pruning, quantisation, export, distillation and training ask about an architecture.

    Attributes:
        made_of: For errors: "YOLOv8 detection models: Conv, C2f, ...".
        layers: Stock class of a layer, exactly -> what is known of it; the head is one of them.
        head: Class of the last layer.
        split: Replaces blocks of a copy, in place, whose channels dependency tracing cannot follow; returns the copy.
        parts: Conv blocks of the split view by name that are slices of a stock block. Parts of one stock block keep
            equally many channels.
        outputs: Names of the convolutions whose output channels are the model's outputs; they are never pruned.
        refresh: Brings attributes beside the tensors in line with their shapes, in place, after channels went.
        for_export: Readies the layers of a copy for tracing, in place; the head has its own (`detect.for_export`).
        strides: Of the maps that enter the head, pixels.
        deep_to_shallow: Pairs "STUDENT=TEACHER" of layers by which a model teaches itself.
        yaml_layers: Names of the layers before the head in Ultralytics' yaml files.
        yaml: Names of the yaml files that can be trained from scratch; the groups are scale and variant.
        yaml_file: The file of Ultralytics' `cfg/models` without the scale, with `{variant}`.
        yaml_names: For errors: "yolov8n.yaml to yolov8x.yaml".
    """

    made_of: str
    layers: Mapping[type[nn.Module], Layer]
    head: type[nn.Module]
    split: Callable[[nn.Module], nn.Module]
    parts: Callable[[nn.Module], dict[str, Part]]
    outputs: Callable[[nn.Module], list[str]]
    refresh: Callable[[nn.Module], None]
    for_export: Callable[[nn.Module], None]
    strides: tuple[int, ...]
    deep_to_shallow: tuple[str, ...]
    yaml_layers: frozenset[str]
    yaml: re.Pattern[str]
    yaml_file: str
    yaml_names: str

    def strange(self, layers: nn.Sequential) -> int | None:
        """Index of the first layer that this family does not have; None where it has them all."""
        last = len(layers) - 1
        for index, layer in enumerate(layers):
            known = (
                type(layer) is self.head
                if index == last
                else type(layer) in self.layers and type(layer) is not self.head
            )
            if not known:
                return index
        return None
