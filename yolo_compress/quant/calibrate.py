"""Ranges of activations from un-augmented images, streaming: the memory does not grow with their number."""

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
    """Counts of `|x|` in a fixed number of equal bins from 0; when a value passes the top, bins merge in pairs."""

    BINS = 2048  # at least half of them are in use, so a range is found to 1/1024 of the largest value

    def __init__(self) -> None:
        self.counts: np.ndarray = np.zeros(self.BINS, np.int64)
        self.top = 0.0
        self.amax = 0.0

    def collect(self, x: Tensor, amax: float, bins: bool = True) -> None:
        """Add a tensor whose largest absolute value is `amax` (> 0); without `bins` keep nothing but that."""
        self.amax = max(self.amax, amax)
        if not bins:
            return
        if self.top == 0.0:
            self.top = amax
        while self.top < amax:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(self.BINS // 2, np.int64)])
            self.top *= 2
        x = x.detach().flatten()
        if x.is_cuda:  # histc counts in float32: exact below 2**24
            parts = [torch.histc(part.float().abs(), self.BINS, 0.0, self.top) for part in x.split(1 << 22)]
            self.counts += sum(part.cpu().numpy().astype(np.int64) for part in parts)
            return
        counts: Any = np.zeros(self.BINS + 1, np.int64)  # the last one holds what equals the top
        for part in x.split(1 << 16):  # in parts that stay in the cache: 9 times faster than torch.histc (torch 2.14)
            index = part.float().abs().mul_(self.BINS / self.top).to(torch.int64)
            counts += np.bincount(index.numpy(), minlength=self.BINS + 1)
        self.counts += counts[:-1]
        self.counts[-1] += counts[-1]

    def used(self) -> tuple[np.ndarray, np.ndarray]:
        """Counts and edges up to the last bin that holds anything."""
        bins = int(self.counts.nonzero()[0].max()) + 1
        return self.counts[:bins].copy(), np.linspace(0.0, self.top * bins / self.BINS, bins + 1)


def _max(histogram: Histogram, percentile: float) -> float:
    return histogram.amax


def _percentile(histogram: Histogram, percentile: float) -> float:
    """The upper edge of the bin that reaches the percentile: never 0, even where nearly all values are."""
    counts, edges = histogram.used()
    below = np.cumsum(counts)
    return float(edges[1:][np.searchsorted(below, below[-1] * (percentile / 100))])


def _mse(histogram: Histogram, percentile: float) -> float:
    """The range with the least squared error of rounding and clipping.

    Ours, because ModelOpt 0.47's search passes the number of bits as the bias of its fake quantiser
    (`calib/histogram.py`, `fake_tensor_quant(centers, amax, num_bits, unsigned)`) and so always takes its first candidate.
    """
    counts, edges = histogram.used()
    centers, weights = ((edges[1:] + edges[:-1]) / 2).astype(np.float32), counts.astype(np.float32)
    best, least = histogram.amax, np.inf
    for amax in edges[LEAST_BINS::4]:
        step = np.float32(amax / QMAX)
        rounded = np.minimum(np.rint(centers / step), QMAX) * step
        error = float(np.dot((rounded - centers) ** 2, weights))
        if error < least:
            best, least = float(amax), error
    return best


def _entropy(histogram: Histogram, percentile: float) -> float:
    """The range whose 128 codes have the least Kullback-Leibler divergence from the clipped distribution.

    S. Migacz, "8-bit inference with TensorRT", GTC 2017; both distributions smoothed, as MXNet and ONNX Runtime do. Ours,
    because ModelOpt 0.47's search does not smooth: a range that ends in an empty bin has divergence infinity, one over
    nothing but empty bins NaN, which numpy's argmin then takes (images: 256 values in 2048 bins, few of them dark).
    """
    counts, edges = histogram.used()
    counts[0] = min(counts[0], counts[1])  # exact zeros stay exact in any range; as in pytorch-quantization
    best, least = histogram.amax, np.inf
    for bins in range(len(counts), LEAST_BINS - 1, -16):
        inside = counts[:bins]
        if not inside.any():
            break
        code = np.arange(bins) * CODES // bins
        filled = np.bincount(code, inside > 0, CODES)
        level = np.bincount(code, inside, CODES) / np.maximum(filled, 1)
        kept = np.where(inside > 0, level[code], 0.0)
        clipped = inside.astype(np.float64)
        clipped[-1] += counts[bins:].sum()
        p, q = ((1 - SMOOTHING) * x / x.sum() + SMOOTHING / bins for x in (clipped, kept))
        divergence = float((p * np.log(p / q)).sum())
        if divergence < least:
            best, least = float(edges[bins]), divergence
    return best


CODES = QMAX + 1  # of absolute values
LEAST_BINS = 128  # of a range: in fewer the 128 codes could not be told apart (pytorch-quantization, ModelOpt)
SMOOTHING = 1e-4  # share of a uniform distribution; MXNet's and ONNX Runtime's

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
    """Post-training quantisation: the ranges of everything that `quant.plan.plan` puts into INT8, without training.

    Args:
        model: A detector. In evaluation mode during the call; not changed.
        batches: Gives the calibration images, `images_BCHW` float 0 to 1, never augmented.
        method: Key of `CALIBRATORS`, over all values of a group's tensors together. Weights always take their maximum, a range an
            output channel.
        percentile: Of the absolute values, for "percentile".
        left: Groups of the plan to leave in float.
        weight_bits: Of the INT8 weights, 7 or 8.

    Raises:
        DataError: No images.
        NumericsError: NaN or infinity in an activation or a weight.
        RecipeError: Unknown method or group.
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
    """As `ptq`, for a plan of the caller's."""
    if method not in CALIBRATORS:
        raise RecipeError(f"calibration method {method!r} is unknown; there are {', '.join(CALIBRATORS)}")
    modules = dict(model.named_modules())
    groups = {group.name: Histogram() for group in placed.int8}
    tensors = {tensor: groups[group.name] for group in placed.int8 for tensor in group.tensors}
    outputs = {name: Histogram() for name in placed.convs}
    _observe(model, modules, tensors, outputs, batches, bins=method != "max")
    amax_of = CALIBRATORS[method]
    amax = {name: _range(name, seen, amax_of, percentile) for name, seen in groups.items()}
    return QuantState(
        activations={tensor: amax[group.name] for group in placed.int8 for tensor in group.tensors},
        weights={name: _weight_range(name, modules[name]) for name in placed.convs},
        outputs={name: _range(name, seen, amax_of, percentile) for name, seen in outputs.items()},
        folded=not any(isinstance(module, nn.BatchNorm2d) for module in modules.values()),
        method=f"percentile {percentile}" if method == "percentile" else method,
        weight_bits=weight_bits,
    )


def _observe(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    tensors: Mapping[str, Histogram],
    outputs: Mapping[str, Histogram],
    batches: Iterable[Tensor],
    bins: bool,
) -> None:
    """Run the batches through the model in evaluation mode and fill the histograms."""
    handles = [
        modules[name].register_forward_hook(_output_hook(name, seen, bins))
        for name, seen in tensors.items()
        if name != IMAGES
    ]
    for name, seen in outputs.items():
        last = norm_after(modules, name) or modules[name]  # before the activation
        handles.append(last.register_forward_hook(_output_hook(name, seen, bins)))
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
        raise DataError("calibration got no image: give at least one (data.limit_train, qat.calib_images)")


def _output_hook(name: str, seen: Histogram, bins: bool) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        _collect(name, seen, output, bins)

    return hook


def _collect(what: str, seen: Histogram, x: Tensor, bins: bool) -> None:
    low, high = torch.aminmax(x.detach())
    amax = max(-float(low), float(high))
    if not np.isfinite(amax):
        raise NumericsError(f"calibration: {what} holds NaN or infinity; the model or an image is broken")
    if amax > 0:
        seen.collect(x, amax, bins)


def _range(what: str, seen: Histogram, amax_of: Callable[[Histogram, float], float], percentile: float) -> float:
    amax = min(amax_of(seen, percentile), seen.amax) if seen.amax > 0 else 0.0
    if amax < AMAX_FLOOR:
        warnings.warn(f"calibration: {what} is 0 on every image; its range is set to {AMAX_FLOOR}", stacklevel=3)
        return float(np.float32(AMAX_FLOOR))
    return float(np.float32(amax))  # what every quantiser and every file holds


def _weight_range(name: str, conv: nn.Module) -> tuple[float, ...]:
    parameter = conv._parameters["weight"]  # of a fake-quantised convolution, `.weight` may be the quantised one
    assert parameter is not None
    amax_C = parameter.detach().float().abs().amax(dim=(1, 2, 3)).cpu()
    if not bool(torch.isfinite(amax_C).all()):
        raise NumericsError(f"calibration: weight of {name} holds NaN or infinity")
    return tuple(amax_C.clamp_min(AMAX_FLOOR).tolist())
