"""Ranges of activations from un-augmented images, streaming: the memory does not grow with their number."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from yolo_compress.errors import DataError, NumericsError, RecipeError
from yolo_compress.quant.fakequant import amax_of_histogram
from yolo_compress.quant.placement import plan
from yolo_compress.quant.state import AMAX_FLOOR, QuantState


class Histogram:
    """Counts of `|x|` in a fixed number of equal bins from 0; when a value passes the top, bins merge in pairs."""

    BINS = 2048  # at least half of them are in use, so a range is found to 1/1024 of the largest value

    def __init__(self) -> None:
        self.counts = torch.zeros(self.BINS, dtype=torch.int64)
        self.top = 0.0
        self.amax = 0.0

    def collect(self, x: Tensor, amax: float) -> None:
        """Add a tensor whose largest absolute value is `amax` (> 0)."""
        self.amax = max(self.amax, amax)
        if self.top == 0.0:
            self.top = amax
        while self.top < amax:
            merged = self.counts.view(-1, 2).sum(1)
            self.counts = torch.cat([merged, torch.zeros_like(merged)])
            self.top *= 2
        for part in x.detach().float().abs().flatten().split(1 << 22):  # histc counts in float32: exact below 2**24
            self.counts += torch.histc(part, self.BINS, 0.0, self.top).cpu().to(torch.int64)

    def used(self) -> tuple[np.ndarray, np.ndarray]:
        """Counts and edges up to the last bin that holds anything."""
        bins = int(self.counts.nonzero().max()) + 1
        return self.counts[:bins].numpy().copy(), np.linspace(0.0, self.top * bins / self.BINS, bins + 1)


def _max(histogram: Histogram, percentile: float) -> float:
    return histogram.amax


def _percentile(histogram: Histogram, percentile: float) -> float:
    counts, edges = histogram.used()
    return min(amax_of_histogram(counts, edges, "percentile", percentile=percentile), histogram.amax)


def _mse(histogram: Histogram, percentile: float) -> float:
    counts, edges = histogram.used()
    if len(counts) <= START_BIN:  # all values in the lowest bins: nothing to search
        return histogram.amax
    return min(amax_of_histogram(counts, edges, "mse", stride=4, start_bin=START_BIN), histogram.amax)


def _entropy(histogram: Histogram, percentile: float) -> float:
    counts, edges = histogram.used()
    if len(counts) <= START_BIN:
        return histogram.amax
    return min(amax_of_histogram(counts, edges, "entropy", stride=16, start_bin=START_BIN), histogram.amax)


START_BIN = 128  # ModelOpt's and pytorch-quantization's: a range below 128 bins could not hold 128 codes

CALIBRATORS: dict[str, Callable[[Histogram, float], float]] = {
    "max": _max,
    "percentile": _percentile,
    "mse": _mse,
    "entropy": _entropy,
}


def ptq(
    model: nn.Module, batches: Callable[[], Iterable[Tensor]], method: str = "mse", percentile: float = 99.99
) -> QuantState:
    """Post-training quantisation: the ranges of the planned convolutions, without training.

    Args:
        model: A stock detector, or a fake-quantised one (the ranges are then those of what its quantisers get). In
            evaluation mode during the call; not changed.
        batches: Gives the calibration images, `images_BCHW` float 0 to 1, never augmented.
        method: Key of `CALIBRATORS`. Weights always take their maximum, a range an output channel.
        percentile: Of the absolute values, for "percentile".

    Raises:
        DataError: No images.
        NumericsError: NaN or infinity in an activation or a weight.
        RecipeError: Unknown method.
    """
    return calibrate(model, plan(model).convs, batches(), method, percentile)


def calibrate(
    model: nn.Module, convs: Iterable[str], batches: Iterable[Tensor], method: str = "mse", percentile: float = 99.99
) -> QuantState:
    """As `ptq`, for the convolutions named."""
    if method not in CALIBRATORS:
        raise RecipeError(f"calibration method {method!r} is unknown; there are {', '.join(CALIBRATORS)}")
    modules = dict(model.named_modules())
    convs = tuple(convs)
    inputs = {name: Histogram() for name in convs}
    outputs = {name: Histogram() for name in _output_names(convs, modules)}
    _observe(model, modules, inputs, outputs, batches)
    amax_of = CALIBRATORS[method]
    return QuantState(
        activations={name: _range(f"input of {name}", seen, amax_of, percentile) for name, seen in inputs.items()},
        weights={name: _weight_range(name, modules[name]) for name in convs},
        outputs={name: _range(f"output of {name}", seen, amax_of, percentile) for name, seen in outputs.items()},
        folded=not any(isinstance(module, nn.BatchNorm2d) for module in modules.values()),
        method=f"percentile {percentile}" if method == "percentile" else method,
    )


def _output_names(convs: Iterable[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Convolutions, their blocks, and the bottlenecks that add a shortcut to their second block."""
    names = dict.fromkeys(convs)
    for conv in list(names):
        block = conv.removesuffix(".conv")
        names[block] = None
        parent = block.rpartition(".")[0]
        if getattr(modules.get(parent), "add", False) is True:
            names[parent] = None
    return list(names)


def _observe(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    inputs: Mapping[str, Histogram],
    outputs: Mapping[str, Histogram],
    batches: Iterable[Tensor],
) -> None:
    """Run the batches through the model in evaluation mode and fill the histograms."""
    handles = [modules[name].register_forward_pre_hook(_input_hook(name, seen)) for name, seen in inputs.items()]
    for name, seen in outputs.items():
        bn = f"{name.removesuffix('conv')}bn"  # what follows a convolution before its activation
        module = modules[bn] if name.endswith(".conv") and bn in modules else modules[name]
        handles.append(module.register_forward_hook(_output_hook(name, seen)))
    modes = {module: module.training for module in model.modules()}
    weight = next(model.parameters())
    count = 0
    model.eval()
    try:
        with torch.no_grad():
            for images in batches:
                model(images.to(weight.device, weight.dtype))
                count += len(images)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    if count == 0:
        raise DataError("calibration got no image: give at least one (data.train, qat.calibration_images)")


def _input_hook(name: str, seen: Histogram) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, args: Any) -> None:
        _collect(f"input of {name}", seen, args[0])

    return hook


def _output_hook(name: str, seen: Histogram) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        _collect(f"output of {name}", seen, output)

    return hook


def _collect(what: str, seen: Histogram, x: Tensor) -> None:
    amax = float(x.detach().abs().max())
    if not np.isfinite(amax):
        raise NumericsError(f"calibration: {what} holds NaN or infinity; the model or an image is broken")
    if amax > 0:
        seen.collect(x, amax)


def _range(what: str, seen: Histogram, amax_of: Callable[[Histogram, float], float], percentile: float) -> float:
    amax = amax_of(seen, percentile) if seen.amax > 0 else 0.0
    if amax < AMAX_FLOOR:
        warnings.warn(f"calibration: {what} is 0 on every image; its range is set to {AMAX_FLOOR}", stacklevel=3)
        return AMAX_FLOOR
    return amax


def _weight_range(name: str, conv: nn.Module) -> tuple[float, ...]:
    parameter = conv._parameters["weight"]  # of a fake-quantised convolution, `.weight` may be the quantised one
    assert parameter is not None
    amax_C = parameter.detach().float().abs().amax(dim=(1, 2, 3)).cpu()
    if not bool(torch.isfinite(amax_C).all()):
        raise NumericsError(f"calibration: weight of {name} holds NaN or infinity")
    return tuple(amax_C.clamp_min(AMAX_FLOOR).tolist())
