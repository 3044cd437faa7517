"""Compute the cost of a pruned model from its channel counts, without building the model: MACs, parameters or milliseconds.

A price is a function that returns this cost. Its arguments are the numbers of output and input channels of all convolutions, in the
order of `conv_shapes`. The cost decreases with every channel that is removed. MACs are the multiply-accumulates of all convolutions
for one image; GFLOPs are 2 x GMACs. What only training uses (`detect.only_trained`) has no cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from yolo_compress.errors import RecipeError
from yolo_compress.nets import detect
from yolo_compress.nets.conv import norm_after
from yolo_compress.nets.meta_copy import blank_images, shadow
from yolo_compress.prune.graph import Group, Member
from yolo_compress.runtime.measure.layer_times import LayerTable

# (out_N, in_N), the numbers of output and input channels of the N convolutions -> cost
Price = Callable[[np.ndarray, np.ndarray], float]


class MacSums:
    """Sums over the convolutions of a plan, whose `macs` has name -> MACs before and after."""

    macs: dict[str, tuple[int, int]]

    @property
    def macs_before(self) -> int:
        """MACs of all convolutions before."""
        return sum(before for before, _ in self.macs.values())

    @property
    def macs_after(self) -> int:
        """MACs of all convolutions after."""
        return sum(after for _, after in self.macs.values())

    @property
    def kept_flops(self) -> float:
        """MACs after, divided by the MACs before."""
        return self.macs_after / self.macs_before


@dataclass(frozen=True)
class ConvShape:
    """Sizes of a convolution, from which its MACs and parameters follow for any number of channels.

    Attributes:
        area: MACs for each pair of a filter and a channel that it reads: kernel height x width x output pixels.
        kernel: weights for each such pair: kernel height x width.
        own: further parameters per filter: the bias, and gamma and beta of the BatchNorm.
        out_channels: number of filters.
        in_channels: number of channels that each filter reads; 1 for a depthwise convolution.
    """

    area: int
    kernel: int
    own: int
    out_channels: int
    in_channels: int

    @property
    def macs(self) -> int:
        """MACs of the convolution for one image."""
        return self.area * self.out_channels * self.in_channels

    @property
    def parameters(self) -> int:
        """Parameters of the convolution and of its BatchNorm."""
        return (self.kernel * self.in_channels + self.own) * self.out_channels


def conv_shapes(model: nn.Module, imgsz_hw: tuple[int, int]) -> dict[str, ConvShape]:
    """Return convolution name -> shape for every convolution of inference, DFL included, for an image of `imgsz_hw` pixels.

    Only shapes are traced; no values are computed.
    """
    shapes: dict[str, ConvShape] = {}
    copy = shadow(model)
    detect.deploy(copy)
    modules = dict(copy.named_modules())

    def record(name: str, conv: nn.Conv2d, output_BCHW: Tensor) -> None:
        pixels = output_BCHW.shape[-2] * output_BCHW.shape[-1]
        kernel = conv.kernel_size[0] * conv.kernel_size[1]
        previous = shapes[name].area if name in shapes else 0  # a convolution that runs twice costs twice
        own = (conv.bias is not None) + 2 * isinstance(norm_after(modules, name), nn.BatchNorm2d)
        shapes[name] = ConvShape(previous + kernel * pixels, kernel, own, conv.out_channels, conv.weight.shape[1])

    for name, module in modules.items():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda conv, _, output, name=name: record(name, conv, output))
    with torch.no_grad():
        copy(blank_images(copy, imgsz_hw))
    return shapes


def conv_macs(model: nn.Module, imgsz_hw: tuple[int, int]) -> int:
    """Return the MACs of all convolutions, DFL included, for one image of `imgsz_hw` pixels. Only shapes are traced."""
    return sum(shape.macs for shape in conv_shapes(model, imgsz_hw).values())


def channel_macs(model: nn.Module, groups: Sequence[Group], imgsz_hw: tuple[int, int]) -> dict[str, int]:
    """Return group name -> MACs per image that the model saves if one channel of the group is removed.

    The saving is the sum over all convolutions of the group that write or read the channel at inference.
    """
    shapes = conv_shapes(model, imgsz_hw)

    def cost(member: Member) -> int:
        shape = shapes[member.module]
        return shape.area * (shape.in_channels if member.role == "out" else shape.out_channels)

    return {
        group.name: sum(cost(member) for member in group.members if member.role != "norm" and member.module in shapes)
        for group in groups
    }


def parameters(model: nn.Module) -> int:
    """Return the number of parameters that a model has at inference, without buffers."""
    unused = {parameter for module in detect.only_trained(model) for parameter in module.parameters(recurse=False)}
    return sum(parameter.numel() for parameter in model.parameters() if parameter not in unused)


def macs_price(shapes: Mapping[str, ConvShape]) -> Price:
    """Return a function that computes the MACs per image from the channels of all convolutions."""
    area_N = np.array([shape.area for shape in shapes.values()], dtype=np.int64)
    return lambda out_N, in_N: int((area_N * out_N * in_N).sum())


def parameters_price(shapes: Mapping[str, ConvShape]) -> Price:
    """Return a function that computes the number of parameters from the channels of all convolutions.

    Parameters of convolutions and BatchNorms are counted. Supported detectors have no others.
    """
    kernel_N = np.array([shape.kernel for shape in shapes.values()], dtype=np.int64)
    own_N = np.array([shape.own for shape in shapes.values()], dtype=np.int64)
    return lambda out_N, in_N: int((kernel_N * out_N * in_N + own_N * out_N).sum())


def full_channels(shapes: Mapping[str, ConvShape]) -> tuple[np.ndarray, np.ndarray]:
    """Return (out_N, in_N), the arguments of a price function for the model that has these shapes."""
    return (
        np.array([shape.out_channels for shape in shapes.values()]),
        np.array([shape.in_channels for shape in shapes.values()]),
    )


def check_table(shapes: Mapping[str, ConvShape], table: LayerTable) -> None:
    """Check that a table of layer times was measured with the model that has these shapes.

    Raises:
        RecipeError: The table has other convolutions than the model.
    """
    if missing := [name for name in shapes if name not in table["layers"]]:
        raise RecipeError(
            f"prune.latency_table: the table has no layer {missing[0]}, so it belongs to another model; measure it again"
        )
    if foreign := [name for name in table["layers"] if name not in shapes]:
        raise RecipeError(
            f"prune.latency_table: the model has no layer {foreign[0]}, so the table belongs to another model; measure it again"
        )


def latency_price(shapes: Mapping[str, ConvShape], table: LayerTable) -> Price:
    """Return a function that estimates the latency in ms per inference from the channels of all convolutions.

    The estimate uses times of each layer that were measured at several widths (`runtime.measure.layer_times`). The time of a
    convolution with its activation is interpolated linearly in the MACs of the convolution. The total time of all other layers
    (splits, concats, pooling, decoding) is interpolated in the square root of the model's MACs. This root is proportional to the
    width. The sum is scaled to the time of the whole model, since the profiler slows down single layers.

    Args:
        shapes: `conv_shapes` of the model. It may lack convolutions of the table, which then take no time.
        table: Layer times of the unpruned model with all its convolutions. `check_table` has accepted it.
    """
    area_N = np.array([shape.area for shape in shapes.values()], dtype=np.float64)
    curves = [_curve(table["layers"][name]) for name in shapes]
    rest = _curve(table["rest"])
    scale = table_scale(table)
    return lambda out_N, in_N: scale * _unscaled_ms(curves, rest, area_N * out_N * in_N)


def table_scale(table: LayerTable) -> float:
    """Return the latency of the whole unpruned model divided by the sum of the times in the table. The profiler slows down layers."""
    every = [_curve(points) for points in table["layers"].values()]
    return float(table["whole_ms"]) / _unscaled_ms(
        every, _curve(table["rest"]), np.array([curve[0, -1] for curve in every])
    )


def conv_ms(table: LayerTable, name: str, macs: float) -> float:
    """Return the time of the convolution `name` with `macs` MACs, before `table_scale`: interpolated between its measured times."""
    return _interpolate(_curve(table["layers"][name]), macs)


def _unscaled_ms(curves: Sequence[np.ndarray], rest: np.ndarray, macs_N: np.ndarray) -> float:
    convs = sum(_interpolate(curve, macs) for curve, macs in zip(curves, macs_N, strict=True))
    return convs + _interpolate(rest, float(np.sqrt(macs_N.sum())))


def _curve(points: Sequence[list[float]]) -> np.ndarray:
    return np.array(sorted(points)).T


def _interpolate(curve: np.ndarray, x: float) -> float:
    """Return the value at `x` of a curve, given as points, by linear interpolation. The curve is first made non-decreasing.

    If `x` is below the first point, the line through the first two points is extended, but the value is at least 0.
    """
    xs, ys = curve[0], np.maximum.accumulate(curve[1])
    if x < xs[0] and len(xs) > 1 and xs[1] > xs[0]:
        return float(max(ys[0] + (x - xs[0]) * (ys[1] - ys[0]) / (xs[1] - xs[0]), 0.0))
    return float(np.interp(x, xs, ys))


class Widths:
    """Converts the widths of channel groups to the channels of every convolution, the arguments of a price function.

    Args:
        shapes: `conv_shapes` of the model.
        members: For each width, (convolution, role "out" or "in", factor) of every convolution side that has this many channels
            times the factor. Convolutions that are not in `shapes` only run in training and are ignored.
        full: Widths of the unpruned model.
    """

    def __init__(
        self, shapes: Mapping[str, ConvShape], members: Sequence[Sequence[tuple[str, str, int]]], full: np.ndarray
    ) -> None:
        rows = {name: row for row, name in enumerate(shapes)}
        self._slots = {role: np.zeros((len(rows), len(members)), dtype=np.int64) for role in ("out", "in")}
        for column, slices in enumerate(members):
            for name, role, factor in slices:
                if name in rows:
                    self._slots[role][rows[name], column] += factor
        channels = {
            "out": np.array([shape.out_channels for shape in shapes.values()], dtype=np.int64),
            "in": np.array([shape.in_channels for shape in shapes.values()], dtype=np.int64),
        }
        self._fixed = {role: channels[role] - self._slots[role] @ full for role in channels}

    def channels(self, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (out_N, in_N): numbers of output and input channels of the N convolutions."""
        out, inputs = (self._fixed[role] + self._slots[role] @ widths for role in ("out", "in"))
        return out, inputs
