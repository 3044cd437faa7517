"""The family of YOLOv8 detectors (n to x), and the split view of C2f.

The split view is a copy of a model in which every `C2f` is replaced by a `SplitC2f`. Stock `C2f` has one convolution `cv1` and
divides its output into two halves with `chunk`. Torch-Pruning 1.6.1 cannot trace `chunk` (IndexError). In `SplitC2f` each half has
its own convolution. Checkpoints contain only stock classes: plain Ultralytics and ULTRALYTICS_SAFE_LOAD=1 refuse all others.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.modules import SPPF, Bottleneck, C2f, Concat, Conv, Detect

from yolo_compress.errors import RecipeError
from yolo_compress.nets import detect
from yolo_compress.nets.conv import check_conv, concatenate_outputs, copy_with_outputs
from yolo_compress.nets.family import Family, Layer, Part
from yolo_compress.nets.flow import Flow

_LAYER_ATTRIBUTES = ("i", "f", "type", "np")  # set by Ultralytics' parse_model on every layer of `model.model`

# --- the split view -----------------------------------------------------------------------------------------------------


class SplitC2f(nn.Module):
    """C2f with two convolutions, `cv1a` and `cv1b`, in place of `cv1`. The outputs equal those of C2f.

    The output of `cv1a` goes to the concatenation only. The output of `cv1b` goes to the bottlenecks too.
    """

    def __init__(self, block: C2f) -> None:
        super().__init__()
        half = block.cv1.conv.out_channels // 2
        self.c = block.c
        self.cv1a = copy_with_outputs(block.cv1, torch.arange(half))
        self.cv1b = copy_with_outputs(block.cv1, torch.arange(half, 2 * half))
        self.cv2 = block.cv2
        self.m = block.m
        self.training = block.training
        _copy_attributes(block, self)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        parts = [self.cv1a(x_BCHW), self.cv1b(x_BCHW)]
        parts.extend(bottleneck(parts[-1]) for bottleneck in self.m)
        return self.cv2(torch.cat(parts, 1))


def split_c2f(model: nn.Module) -> nn.Module:
    """Replace every C2f of `model` by a SplitC2f, in place, and return `model`. Other blocks do not change."""
    for parent, name, block in _children(model, C2f):
        setattr(parent, name, SplitC2f(block))
    return model


def merge_c2f(model: nn.Module) -> nn.Module:
    """Replace every SplitC2f of `model` by a C2f, in place, and return `model`.

    Raises:
        RecipeError: The two halves of a block have different numbers of channels. C2f needs equal halves because of `chunk`.
    """
    for parent, name, block in _children(model, SplitC2f):
        setattr(parent, name, _merged(block))
    return model


def _merged(block: SplitC2f) -> C2f:
    half, other = block.cv1a.conv.out_channels, block.cv1b.conv.out_channels
    if half != other:
        raise RecipeError(f"C2f halves of {half} and {other} channels cannot merge; keep equal counts")
    merged = C2f.__new__(C2f)  # the constructor would allocate and initialise weights that are replaced at once
    nn.Module.__init__(merged)
    merged.c, merged.cv1, merged.cv2, merged.m = half, concatenate_outputs(block.cv1a, block.cv1b), block.cv2, block.m
    merged.training = block.training
    _copy_attributes(block, merged)
    return merged


def _copy_attributes(source: nn.Module, target: nn.Module) -> None:
    for name in _LAYER_ATTRIBUTES:
        if name in source.__dict__:
            setattr(target, name, source.__dict__[name])


def _children(model: nn.Module, kind: type[nn.Module]) -> list[tuple[nn.Module, str, Any]]:
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is kind
    ]


def _halves(model: nn.Module) -> dict[str, Part]:
    halves = {}
    for name, block in model.named_modules():
        if isinstance(block, C2f):
            halves[f"{name}.cv1a"] = Part(f"{name}.cv1", 0)
            halves[f"{name}.cv1b"] = Part(f"{name}.cv1", block.cv1.conv.out_channels // 2)
    return halves


def _refresh(model: nn.Module) -> None:
    for block in model.modules():
        if isinstance(block, C2f):
            block.c = block.cv1.conv.out_channels // 2


def _split_by_sizes(model: nn.Module) -> None:
    """Make C2f use `split` with sizes instead of `chunk`, in place, as Ultralytics' exporter does.

    The ONNX exporter would turn `chunk` into slices.
    """
    for module in model.modules():
        if type(module) is C2f:
            module.forward = module.forward_split


# --- which blocks can be edited -----------------------------------------------------------------------------------------


def _check_c2f(name: str, block: C2f) -> None:
    check_conv(f"{name}.cv1", block.cv1)
    check_conv(f"{name}.cv2", block.cv2)
    for i, bottleneck in enumerate(block.m):
        if type(bottleneck) is not Bottleneck:
            raise RecipeError(f"prune: {name}.m.{i} is a {type(bottleneck).__name__}, expected Bottleneck")
        check_conv(f"{name}.m.{i}.cv1", bottleneck.cv1)
        check_conv(f"{name}.m.{i}.cv2", bottleneck.cv2)


def _check_sppf(name: str, block: SPPF) -> None:
    check_conv(f"{name}.cv1", block.cv1)
    check_conv(f"{name}.cv2", block.cv2)


def _nothing_to_check(name: str, layer: nn.Module) -> None:
    pass


# --- data flow of each kind of block ------------------------------------------------------------------------------------


def _wire_conv(flow: Flow, name: str, layer: Conv, sources: list[str]) -> str:
    return flow.conv(name, sources[0])


def _wire_c2f(flow: Flow, name: str, block: C2f, sources: list[str]) -> str:
    parts = [flow.conv(f"{name}.cv1", sources[0])]  # both halves count as one tensor: they share a scale
    for index, bottleneck in enumerate(block.m):
        inner = f"{name}.m.{index}"
        if bottleneck.add:
            parts.append(flow.shortcut(inner, parts[-1], "cv1", "cv2"))
        else:
            parts.append(flow.conv(f"{inner}.cv2", flow.conv(f"{inner}.cv1", parts[-1])))
    return flow.conv(f"{name}.cv2", flow.join(f"{name} (concat)", *parts))


def _wire_sppf(flow: Flow, name: str, block: SPPF, sources: list[str]) -> str:
    if getattr(block, "add", False):
        raise RecipeError(f"quantise: {name} is an SPPF with a shortcut, expected one without")
    pooled = flow.conv(f"{name}.cv1", sources[0])
    flow.join(f"{name} (pools)", pooled)
    return flow.conv(f"{name}.cv2", pooled)


def _wire_concat(flow: Flow, name: str, layer: Concat, sources: list[str]) -> str:
    return flow.join(name, *sources)


def _wire_upsample(flow: Flow, name: str, layer: nn.Upsample, sources: list[str]) -> str:
    return sources[0]


YOLOV8 = Family(
    made_of="YOLOv8 detection models: Conv, C2f, SPPF, Upsample, Concat and a legacy Detect head",
    layers={
        Conv: Layer(check_conv, _wire_conv),
        C2f: Layer(_check_c2f, _wire_c2f),
        SPPF: Layer(_check_sppf, _wire_sppf),
        Concat: Layer(_nothing_to_check, _wire_concat),
        nn.Upsample: Layer(_nothing_to_check, _wire_upsample),
        Detect: detect.DETECT,
    },
    head=Detect,
    split=split_c2f,
    parts=_halves,
    outputs=detect.outputs,
    refresh=_refresh,
    for_export=_split_by_sizes,
    strides=(8, 16, 32),
    # backbone layer = layer of the same stride whose output enters the head; the same in all sizes n to x
    deep_to_shallow=("model.4=model.15", "model.6=model.18", "model.9=model.21"),
    yaml_layers=frozenset({"Conv", "C2f", "SPPF", "nn.Upsample", "torch.nn.Upsample", "Concat"}),
    yaml=re.compile(r"yolov8([nsmlx])([\w-]*)\.yaml"),
    yaml_file="v8/yolov8{variant}.yaml",
    yaml_names="yolov8n.yaml to yolov8x.yaml",
)
