"""Ultralytics' blocks that several families have: Conv, Concat, Upsample, SPPF, and C2f with its kinds of inner blocks.

For each block there are two functions: one checks that its channels can be removed, one adds it to the data flow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.modules import C2, C2PSA, SPPF, Bottleneck, C2f, Concat, Conv

from yolo_compress.errors import RecipeError
from yolo_compress.nets.conv import check_conv
from yolo_compress.nets.factors import is_factorised, output_channels
from yolo_compress.nets.family import Layer
from yolo_compress.nets.flow import FeatureMap, Flow

Check = Callable[[str, Any], None]


def check_inner(name: str, block: nn.Module, known: Mapping[type[nn.Module], Check]) -> None:
    """Check a block inside a layer with the function of its exact class.

    Raises:
        RecipeError: The class is not in `known`, or the check fails.
    """
    if type(block) not in known:
        expected = " or ".join(kind.__name__ for kind in known)
        raise RecipeError(f"prune: {name} is a {type(block).__name__}, expected {expected}")
    known[type(block)](name, block)


def check_bottleneck(name: str, block: Bottleneck) -> None:
    """Check that the channels of a bottleneck can be removed. See `check_conv` for errors."""
    check_conv(f"{name}.cv1", block.cv1)
    check_conv(f"{name}.cv2", block.cv2)


def wire_bottleneck(flow: Flow, name: str, block: Bottleneck, source: FeatureMap) -> FeatureMap:
    """Add a bottleneck, with or without a shortcut, to the flow."""
    if block.add:
        return flow.shortcut(name, source, "cv1", "cv2")
    return flow.conv(f"{name}.cv2", flow.conv(f"{name}.cv1", source))


def check_c2f(name: str, block: C2f | C2, inner: Mapping[type[nn.Module], Check]) -> None:
    """Check that the channels of a C2f or C2 can be removed. `inner` are the classes that the blocks in `m` may have.

    Raises:
        RecipeError: An inner block has another class, or see `check_conv`.
    """
    check_conv(f"{name}.cv1", block.cv1)
    check_conv(f"{name}.cv2", block.cv2)
    for index, module in enumerate(block.m):
        check_inner(f"{name}.m.{index}", module, inner)


def wire_halves(flow: Flow, name: str, block: Any, source: FeatureMap) -> tuple[FeatureMap, FeatureMap]:
    """Add the convolution `cv1`, whose output the block splits into two halves, and return the halves.

    In stock blocks both halves have the same number of channels.
    """
    half = output_channels(block.cv1) // 2
    first, second = flow.split(flow.conv(f"{name}.cv1", source, {f"{name}.cv1a": half, f"{name}.cv1b": half}))
    flow.tie(f"{name}.cv1", first, second)
    return first, second


def wire_c2f(
    flow: Flow,
    name: str,
    block: C2f,
    source: FeatureMap,
    wire_inner: Callable[[Flow, str, Any, FeatureMap], FeatureMap],
) -> FeatureMap:
    """Add a C2f to the flow. `wire_inner` adds one of the blocks in `m`; each of them reads the output of the one before."""
    halves = wire_halves(flow, name, block, source)
    last, outputs = halves[1], {}
    for index, module in enumerate(block.m):
        inner = f"{name}.m.{index}"
        last = outputs[inner] = wire_inner(flow, inner, module, last)
    flow.chain(name, f"{name}.cv2", halves, outputs)
    return flow.conv(f"{name}.cv2", flow.join(f"{name} (concat)", *halves, *outputs.values()))


def keep_first_bottlenecks(block: Any, count: int) -> None:
    """Remove all but the first `count` blocks in `m` of a C2f, in place. The caller removes the input channels of `cv2`."""
    block.m = block.m[:count]


def refresh_halves(model: nn.Module) -> None:
    """Update the number of channels of a half in every block that splits its input, in place."""
    for block in model.modules():
        if isinstance(block, C2f | C2 | C2PSA):
            block.c = output_channels(block.cv1) // 2


def split_by_sizes(model: nn.Module) -> None:
    """Make every C2f and C2 use `split` with sizes instead of `chunk`, in place, as Ultralytics' exporter does for C2f.

    The ONNX exporter would turn `chunk` into slices. A C2f without bottlenecks splits nothing, since it would concatenate the
    same halves again.
    """
    for module in model.modules():
        if isinstance(module, C2f):
            module.forward = module.forward_split if len(module.m) else partial(_c2f_without_bottlenecks, module)
        if isinstance(module, C2):
            module.forward = partial(_c2_by_sizes, module)


def _c2f_without_bottlenecks(block: C2f, x_BCHW: Tensor) -> Tensor:
    output_BCHW: Tensor = block.cv2(block.cv1(x_BCHW))
    return output_BCHW


def _c2_by_sizes(block: C2, x_BCHW: Tensor) -> Tensor:
    deep, shallow = block.cv1(x_BCHW).split((block.c, block.c), 1)
    output_BCHW: Tensor = block.cv2(torch.cat((block.m(deep), shallow), 1))
    return output_BCHW


def _wire_conv(flow: Flow, name: str, layer: Conv, sources: list[FeatureMap]) -> FeatureMap:
    return flow.conv(name, sources[0])


def _check_sppf(name: str, block: SPPF) -> None:
    check_conv(f"{name}.cv1", block.cv1)
    check_conv(f"{name}.cv2", block.cv2)


def _wire_sppf(flow: Flow, name: str, block: SPPF, sources: list[FeatureMap]) -> FeatureMap:
    pooled = flow.conv(f"{name}.cv1", sources[0])
    pools = 1 + getattr(block, "n", 3)  # checkpoints of older versions have no `n`
    last = flow.conv(f"{name}.cv2", flow.join(f"{name} (pools)", *[pooled] * pools))
    return flow.add_layer(name, sources[0], last) if getattr(block, "add", False) else last


def _wire_concat(flow: Flow, name: str, layer: Concat, sources: list[FeatureMap]) -> FeatureMap:
    return flow.join(name, *sources)


def _wire_upsample(flow: Flow, name: str, layer: nn.Upsample, sources: list[FeatureMap]) -> FeatureMap:
    return sources[0]


def _wire_factors(flow: Flow, name: str, layer: nn.Sequential, sources: list[FeatureMap]) -> FeatureMap:
    if not is_factorised(layer):
        kinds = " and ".join(type(part).__name__ for part in layer)
        raise RecipeError(f"{name} is a Sequential of {kinds or 'nothing'}, expected the factors of a convolution")
    return flow.conv(name, sources[0])


def _nothing_to_check(name: str, layer: nn.Module) -> None:
    pass


COMMON: dict[type[nn.Module], Layer] = {
    Conv: Layer(check_conv, _wire_conv),
    nn.Sequential: Layer(_nothing_to_check, _wire_factors),  # `factors.check_whole` refuses it before
    SPPF: Layer(_check_sppf, _wire_sppf),
    Concat: Layer(_nothing_to_check, _wire_concat),
    nn.Upsample: Layer(_nothing_to_check, _wire_upsample),
}
COMMON_NAMES = frozenset({"Conv", "SPPF", "nn.Upsample", "torch.nn.Upsample", "Concat"})  # in yaml files
