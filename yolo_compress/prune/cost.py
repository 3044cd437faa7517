"""What a model of given widths costs, without surgery: MACs, parameters or milliseconds of its convolutions.

A price is a function of the output and input channels of all convolutions, in the order of `conv_shapes`; it falls whenever a
channel goes. MACs are multiply-accumulates of convolutions for one image; GFLOPs are 2 x GMACs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from yolo_compress.errors import RecipeError
from yolo_compress.nets.conv import norm_after
from yolo_compress.nets.meta_copy import blank_images, shadow
from yolo_compress.prune.graph import Group, Member
from yolo_compress.runtime.measure.layer_times import LayerTable

Price = Callable[[np.ndarray, np.ndarray], float]  # of out_N and in_N, channels of the N convolutions


@dataclass(frozen=True)
class ConvShape:
    """A convolution as a price sees it.

    Attributes:
        area: kernel height x width x output pixels / groups: MACs for one input and one output channel.
        kernel: kernel height x width / groups: weights for one input and one output channel.
        own: parameters that come with one output channel: its bias, gamma and beta of its BatchNorm.
        out_channels, in_channels: as the model stands.
    """

    area: int
    kernel: int
    own: int
    out_channels: int
    in_channels: int

    @property
    def macs(self) -> int:
        """MACs for one image."""
        return self.area * self.out_channels * self.in_channels


def conv_shapes(model: nn.Module, imgsz_hw: tuple[int, int]) -> dict[str, ConvShape]:
    """Every convolution that runs on an image of `imgsz_hw` pixels, by name, DFL included; nothing is computed."""
    shapes: dict[str, ConvShape] = {}
    twin = shadow(model)
    modules = dict(twin.named_modules())

    def record(name: str, conv: nn.Conv2d, output_BCHW: Tensor) -> None:
        pixels = output_BCHW.shape[-2] * output_BCHW.shape[-1]
        kernel = conv.kernel_size[0] * conv.kernel_size[1]
        previous = shapes[name].area if name in shapes else 0  # a convolution that runs twice costs twice
        own = (conv.bias is not None) + 2 * isinstance(norm_after(modules, name), nn.BatchNorm2d)
        area = previous + kernel * pixels // conv.groups
        shapes[name] = ConvShape(area, kernel // conv.groups, own, conv.out_channels, conv.in_channels)

    for name, module in modules.items():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda conv, _, output, name=name: record(name, conv, output))
    with torch.no_grad():
        twin(blank_images(twin, imgsz_hw))
    return shapes


def conv_macs(model: nn.Module, imgsz_hw: tuple[int, int]) -> int:
    """MACs of all convolutions of `model` for one image of `imgsz_hw` pixels, DFL included; nothing is computed."""
    return sum(shape.macs for shape in conv_shapes(model, imgsz_hw).values())


def channel_macs(model: nn.Module, groups: Sequence[Group], imgsz_hw: tuple[int, int]) -> dict[str, int]:
    """Group name -> MACs of one image that go when one of its channels goes alone, in all members that write or read it."""
    shapes = conv_shapes(model, imgsz_hw)

    def cost(member: Member) -> int:
        shape = shapes[member.module]
        return shape.area * (shape.in_channels if member.role == "out" else shape.out_channels)

    return {group.name: sum(cost(member) for member in group.members if member.role != "norm") for group in groups}


def parameters(model: nn.Module) -> int:
    """Numbers in the parameters of `model`, buffers excluded."""
    return sum(parameter.numel() for parameter in model.parameters())


def macs_price(shapes: Mapping[str, ConvShape]) -> Price:
    """MACs of one image."""
    area_N = np.array([shape.area for shape in shapes.values()], dtype=np.int64)
    return lambda out_N, in_N: int((area_N * out_N * in_N).sum())


def parameters_price(shapes: Mapping[str, ConvShape]) -> Price:
    """Parameters of convolutions and their BatchNorms: all there are in a supported detector."""
    kernel_N = np.array([shape.kernel for shape in shapes.values()], dtype=np.int64)
    own_N = np.array([shape.own for shape in shapes.values()], dtype=np.int64)
    return lambda out_N, in_N: int((kernel_N * out_N * in_N + own_N * out_N).sum())


def latency_price(shapes: Mapping[str, ConvShape], table: LayerTable) -> Price:
    """Milliseconds of one inference, from the times of each layer at several widths (`runtime.measure.layer_times`).

    The time of a convolution with its activation is read off its own curve, piecewise linear in its MACs; what is no
    convolution (splits, concats, pooling, decoding) off one curve over the square root of all MACs, which goes with the
    width. The sum is scaled to the whole network's time, as single layers are timed with the profiler on.

    Raises:
        RecipeError: The table is of another network: a convolution is not in it.
    """
    missing = [name for name in shapes if name not in table["layers"]]
    if missing:
        raise RecipeError(f"prune.latency_table: it knows no {missing[0]}; it was taken on another network")
    area_N = np.array([shape.area for shape in shapes.values()], dtype=np.float64)
    curves = [np.array(sorted(table["layers"][name])).T for name in shapes]
    rest = np.array(sorted(table["rest"])).T

    def unscaled(macs_N: np.ndarray) -> float:
        convs = sum(_along(curve, macs) for curve, macs in zip(curves, macs_N, strict=True))
        return convs + _along(rest, float(np.sqrt(macs_N.sum())))

    dense_N = np.array([curve[0, -1] for curve in curves])
    scale = float(table["whole_ms"]) / unscaled(dense_N)
    return lambda out_N, in_N: scale * unscaled(area_N * out_N * in_N)


def _along(curve: np.ndarray, x: float) -> float:
    """Piecewise linear, never falling; under the first point on the line through the first two, as far as it is positive."""
    xs, ys = curve[0], np.maximum.accumulate(curve[1])
    if x < xs[0] and len(xs) > 1 and xs[1] > xs[0]:
        return float(max(ys[0] + (x - xs[0]) * (ys[1] - ys[0]) / (xs[1] - xs[0]), 0.0))
    return float(np.interp(x, xs, ys))


class Widths:
    """Channels of every convolution as a function of the widths of groups: what prices are asked with.

    Args:
        shapes: `conv_shapes` of the model.
        members: for each width, the (convolution, role "out" or "in") pairs it counts in, one entry a slice.
        full: the widths as the model stands.
    """

    def __init__(
        self, shapes: Mapping[str, ConvShape], members: Sequence[Sequence[tuple[str, str]]], full: Sequence[int]
    ) -> None:
        rows = {name: row for row, name in enumerate(shapes)}
        self._slots = {role: np.zeros((len(rows), len(members)), dtype=np.int64) for role in ("out", "in")}
        for column, slices in enumerate(members):
            for name, role in slices:
                self._slots[role][rows[name], column] += 1
        channels = {
            "out": np.array([shape.out_channels for shape in shapes.values()], dtype=np.int64),
            "in": np.array([shape.in_channels for shape in shapes.values()], dtype=np.int64),
        }
        self._fixed = {role: channels[role] - self._slots[role] @ np.array(full, dtype=np.int64) for role in channels}

    def channels(self, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """out_N, in_N."""
        out, inputs = (self._fixed[role] + self._slots[role] @ widths for role in ("out", "in"))
        return out, inputs
