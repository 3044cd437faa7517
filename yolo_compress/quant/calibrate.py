"""Calibrate the ranges of activations on images without augmentation. Memory use does not depend on the number of images.

The range of a tensor, `amax`, is the largest absolute value that its INT8 values represent. The scale is amax / 127.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from yolo_compress.errors import DataError, NumericsError, RecipeError
from yolo_compress.nets.conv import norm_after
from yolo_compress.nets.eval_mode import evaluating
from yolo_compress.quant.plan import IMAGES, Plan, plan
from yolo_compress.quant.ranges import AMAX_FLOOR, QMAX, WEIGHT_BITS, QuantState


class Histogram:
    """Histogram of absolute values, with a fixed number of equal bins from 0 to `top`.

    If a new value exceeds `top`, `top` doubles and neighbouring bins are merged in pairs.
    """

    BINS = 2048  # at least half of the bins are in use, so a range is exact to 1/1024 of the largest value

    def __init__(self) -> None:
        self.counts: np.ndarray = np.zeros(self.BINS, np.int64)
        self.top = 0.0
        self.amax = 0.0

    def collect(self, x: Tensor, amax: float, bins: bool = True) -> None:
        """Add the absolute values of a tensor to the histogram.

        Args:
            x: Tensor of any shape.
            amax: Largest absolute value of `x`, above 0.
            bins: True fills the bins. False only updates the maximum.
        """
        self.amax = max(self.amax, amax)
        if not bins:
            return
        if self.top == 0.0:
            self.top = amax
        while self.top < amax:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(self.BINS // 2, np.int64)])
            self.top *= 2
        x = x.detach().flatten()
        if x.is_cuda:  # histc counts in float32, which is exact below 2**24, so larger tensors are split
            parts = [torch.histc(part.float().abs(), self.BINS, 0.0, self.top) for part in x.split(1 << 22)]
            self.counts += sum(part.cpu().numpy().astype(np.int64) for part in parts)
            return
        counts: Any = np.zeros(self.BINS + 1, np.int64)  # the last entry counts values equal to `top`
        for part in x.split(1 << 16):  # parts that fit the cache: 9 times faster than torch.histc (torch 2.14)
            index = part.float().abs().mul_(self.BINS / self.top).to(torch.int64)
            counts += np.bincount(index.numpy(), minlength=self.BINS + 1)
        self.counts += counts[:-1]
        self.counts[-1] += counts[-1]

    def used(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the counts and the edges of the bins up to the last one that is not empty."""
        bins = int(self.counts.nonzero()[0].max()) + 1
        return self.counts[:bins].copy(), np.linspace(0.0, self.top * bins / self.BINS, bins + 1)


def _max(histogram: Histogram, percentile: float) -> float:
    return histogram.amax


def _percentile(histogram: Histogram, percentile: float) -> float:
    """Return the range at a percentile: the upper edge of the bin that contains the percentile.

    The range is above 0 even if nearly all values are 0.
    """
    counts, edges = histogram.used()
    below = np.cumsum(counts)
    return float(edges[1:][np.searchsorted(below, below[-1] * (percentile / 100))])


def _mse(histogram: Histogram, percentile: float) -> float:
    """Return the range for which INT8 rounding and clipping have the smallest mean squared error. `percentile` is not used.

    ModelOpt's function is not used because version 0.47 has a bug: it passes the number of bits as the bias of the fake quantiser.
    The first candidate then always wins (`calib/histogram.py`, `fake_tensor_quant(centers, amax, num_bits, unsigned)`).
    """
    counts, edges = histogram.used()
    centers, weights = ((edges[1:] + edges[:-1]) / 2).astype(np.float32), counts.astype(np.float32)
    best, least_error = histogram.amax, np.inf
    for amax in edges[LEAST_BINS::4]:
        step = np.float32(amax / QMAX)
        rounded = np.minimum(np.rint(centers / step), QMAX) * step
        error = float(np.dot((rounded - centers) ** 2, weights))
        if error < least_error:
            best, least_error = float(amax), error
    return best


def _entropy(histogram: Histogram, percentile: float) -> float:
    """Return the range for which 128 INT8 levels have the smallest KL divergence from the clipped distribution of values.

    The method is from S. Migacz, "8-bit inference with TensorRT", GTC 2017. Both distributions are smoothed, as in MXNet and ONNX
    Runtime. `percentile` is not used.

    ModelOpt's function is not used because version 0.47 does not smooth. A range that ends in an empty bin then has an infinite
    divergence. A range with only empty bins has the divergence NaN, and numpy's argmin selects NaN. This happens for the input
    images, which fill at most 256 of the 2048 bins and have few dark pixels.
    """
    counts, edges = histogram.used()
    counts[0] = min(counts[0], counts[1])  # zeros are exact in any range; as in pytorch-quantization
    best, least_divergence = histogram.amax, np.inf
    for bins in range(len(counts), LEAST_BINS - 1, -16):
        inside = counts[:bins]
        if not inside.any():
            break
        code = np.arange(bins) * LEVELS // bins
        filled = np.bincount(code, inside > 0, LEVELS)
        level = np.bincount(code, inside, LEVELS) / np.maximum(filled, 1)
        quantised = np.where(inside > 0, level[code], 0.0)
        clipped = inside.astype(np.float64)
        clipped[-1] += counts[bins:].sum()
        p, q = ((1 - SMOOTHING) * x / x.sum() + SMOOTHING / bins for x in (clipped, quantised))
        divergence = float((p * np.log(p / q)).sum())
        if divergence < least_divergence:
            best, least_divergence = float(edges[bins]), divergence
    return best


LEVELS = QMAX + 1  # number of absolute INT8 values
LEAST_BINS = 128  # smallest range that is tried, one bin per level (as in pytorch-quantization and ModelOpt)
SMOOTHING = 1e-4  # share of a uniform distribution that is mixed in, as in MXNet and ONNX Runtime

CALIBRATORS: dict[str, Callable[[Histogram, float], float]] = {
    "max": _max,
    "percentile": _percentile,
    "mse": _mse,
    "entropy": _entropy,
}


def ptq(
    model: nn.Module,
    batches: Callable[[], Iterable[Tensor]],
    method: str = "mse",
    percentile: float = 99.99,
    left: Collection[str] = (),
    weight_bits: int = WEIGHT_BITS,
) -> QuantState:
    """Return the calibrated ranges of every activation tensor and weight that `quant.plan.plan` sets to INT8.

    This is post-training quantisation (PTQ): no weight is trained or changed.

    Args:
        model: A detector. It is in evaluation mode during the call and otherwise unchanged.
        batches: Function that returns the calibration images, `images_BCHW` float 0 to 1, without augmentation.
        method: Key of `CALIBRATORS`. The method is applied to the values of all tensors that share a scale together. The range
            of a weight is always its largest absolute value per output channel.
        percentile: Percentile of the absolute values in %, for the method "percentile".
        left: Names of the groups (`quant.plan.Group`) to leave in float.
        weight_bits: Bits of the INT8 weights, 7 or 8.

    Raises:
        DataError: There are no images.
        NumericsError: An activation or a weight is NaN or infinite.
        RecipeError: The method or a group name is unknown.
    """
    return calibrate(model, plan(model, left), batches(), method, percentile, weight_bits)


def calibrate(
    model: nn.Module,
    placed: Plan,
    batches: Iterable[Tensor],
    method: str = "mse",
    percentile: float = 99.99,
    weight_bits: int = WEIGHT_BITS,
) -> QuantState:
    """Return the calibrated ranges of every activation tensor and weight that the plan `placed` sets to INT8.

    For the other arguments and the errors see `ptq`.
    """
    if method not in CALIBRATORS:
        raise RecipeError(f"calibration method {method!r} is unknown, expected one of {', '.join(CALIBRATORS)}")
    modules = dict(model.named_modules())
    groups = {group.name: Histogram() for group in placed.int8}
    tensors = {tensor: groups[group.name] for group in placed.int8 for tensor in group.tensors}
    outputs = {name: Histogram() for name in placed.convs}
    # sums before the last one of a block: a tensor between two branches, which the next branch reads
    inner = {
        f"{block}.{branch[0]}": tensors[block]
        for block, (_, *later) in placed.sums.items()
        for branch in later
        if block in tensors
    }
    _fill_histograms(model, modules, tensors, inner, outputs, batches, bins=method != "max")
    find_range = CALIBRATORS[method]
    amax = {name: _activation_range(name, histogram, find_range, percentile) for name, histogram in groups.items()}
    return QuantState(
        activations={tensor: amax[group.name] for group in placed.int8 for tensor in group.tensors},
        weights={name: _weight_range(name, modules[name]) for name in placed.convs},
        outputs={
            name: _activation_range(name, histogram, find_range, percentile) for name, histogram in outputs.items()
        },
        folded=not any(isinstance(module, nn.BatchNorm2d) for module in modules.values()),
        method=f"percentile {percentile}" if method == "percentile" else method,
        weight_bits=weight_bits,
    )


def _fill_histograms(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    tensors: Mapping[str, Histogram],
    inputs: Mapping[str, Histogram],
    outputs: Mapping[str, Histogram],
    batches: Iterable[Tensor],
    bins: bool,
) -> None:
    """Run the batches through the model in evaluation mode and add the activations to the histograms.

    Args:
        modules: Module name -> module.
        tensors: Tensor name (as in `nets.flow`) -> histogram.
        inputs: Module -> histogram of its input.
        outputs: Convolution -> histogram of its output before the activation.
        bins: As for `Histogram.collect`.
    """
    handles = [
        modules[name].register_forward_hook(_output_hook(name, histogram, bins))
        for name, histogram in tensors.items()
        if name != IMAGES
    ]
    for name, histogram in inputs.items():
        handles.append(modules[name].register_forward_pre_hook(_input_hook(name, histogram, bins)))
    for name, histogram in outputs.items():
        last = norm_after(modules, name) or modules[name]  # the last module before the activation
        handles.append(last.register_forward_hook(_output_hook(name, histogram, bins)))
    weight = next(model.parameters())
    count = 0
    try:
        with torch.no_grad(), evaluating(model):
            for images in batches:
                if IMAGES in tensors:
                    _collect(IMAGES, tensors[IMAGES], images, bins)
                model(images.to(weight.device, weight.dtype))
                count += len(images)
    finally:
        for handle in handles:
            handle.remove()
    if count == 0:
        raise DataError("calibration has no images; provide at least one (data.limit_train, qat.calib_images)")


def _output_hook(name: str, histogram: Histogram, bins: bool) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        _collect(name, histogram, output, bins)

    return hook


def _input_hook(name: str, histogram: Histogram, bins: bool) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, args: Any) -> None:
        _collect(name, histogram, args[0], bins)

    return hook


def _collect(what: str, histogram: Histogram, x: Tensor, bins: bool) -> None:
    low, high = torch.aminmax(x.detach())
    amax = max(-float(low), float(high))
    if not np.isfinite(amax):
        raise NumericsError(f"calibration: {what} contains NaN or infinity; check the model and the images")
    if amax > 0:
        histogram.collect(x, amax, bins)


def _activation_range(
    what: str, histogram: Histogram, find_range: Callable[[Histogram, float], float], percentile: float
) -> float:
    amax = min(find_range(histogram, percentile), histogram.amax) if histogram.amax > 0 else 0.0
    if amax < AMAX_FLOOR:
        warnings.warn(f"calibration: {what} is 0 on every image; its range is set to {AMAX_FLOOR}", stacklevel=3)
        return float(np.float32(AMAX_FLOOR))
    return float(np.float32(amax))  # quantisers and files store float32


def _weight_range(name: str, conv: nn.Module) -> tuple[float, ...]:
    parameter = conv._parameters["weight"]  # `.weight` of a fake-quantised convolution may be the quantised weight
    assert parameter is not None
    amax_C = parameter.detach().float().abs().amax(dim=(1, 2, 3)).cpu()
    if not bool(torch.isfinite(amax_C).all()):
        raise NumericsError(f"calibration: weight of {name} contains NaN or infinity; check the model")
    return tuple(amax_C.clamp_min(AMAX_FLOOR).tolist())
