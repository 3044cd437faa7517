"""The family of YOLO11 detectors (n to x): C3k2, C2PSA with attention, depthwise convolutions in the class branch.

Attention splits the output of its convolution `qkv` into query, key and value of each head. Heads and the widths of query and key
stay as they are: the query and key of a head give one number for each pair of pixels, and no convolution reads them. The stock
class adds the heads' values to its input, so all values together are as wide as the input. So the values of each head lose the
same share of their channels as the input does.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from ultralytics.nn.modules import C2PSA, Bottleneck, C3k2, Detect
from ultralytics.nn.modules.block import Attention, C3k, PSABlock

from yolo_compress.errors import RecipeError
from yolo_compress.nets import detect
from yolo_compress.nets.blocks import (
    COMMON,
    COMMON_NAMES,
    check_bottleneck,
    check_c2f,
    check_inner,
    refresh_halves,
    split_by_sizes,
    wire_bottleneck,
    wire_c2f,
    wire_halves,
)
from yolo_compress.nets.conv import check_conv, check_depthwise
from yolo_compress.nets.family import Family, Layer
from yolo_compress.nets.flow import FeatureMap, Flow

IN_ATTENTION = "attention: its softmax and products stay in float"


def check_c3k(name: str, block: C3k) -> None:
    """Check that the channels of a C3k can be removed. See `check_conv` for errors."""
    for child in ("cv1", "cv2", "cv3"):
        check_conv(f"{name}.{child}", getattr(block, child))
    for index, module in enumerate(block.m):
        check_inner(f"{name}.m.{index}", module, {Bottleneck: check_bottleneck})


def wire_c3k(flow: Flow, name: str, block: C3k, source: FeatureMap) -> FeatureMap:
    """Add a C3k to the flow."""
    deep, shallow = flow.conv(f"{name}.cv1", source), flow.conv(f"{name}.cv2", source)
    for index, module in enumerate(block.m):
        deep = wire_bottleneck(flow, f"{name}.m.{index}", module, deep)
    return flow.conv(f"{name}.cv3", flow.join(f"{name} (concat)", deep, shallow))


def _check_c3k2(name: str, block: C3k2) -> None:
    check_c2f(name, block, {Bottleneck: check_bottleneck, C3k: check_c3k})


def _wire_c3k2(flow: Flow, name: str, block: C3k2, sources: list[FeatureMap]) -> FeatureMap:
    return wire_c2f(flow, name, block, sources[0], _wire_inner)


def _wire_inner(flow: Flow, name: str, block: Any, source: FeatureMap) -> FeatureMap:
    return (wire_c3k if isinstance(block, C3k) else wire_bottleneck)(flow, name, block, source)


def _check_attention(name: str, block: Attention) -> None:
    check_conv(f"{name}.qkv", block.qkv)
    check_conv(f"{name}.proj", block.proj)
    check_depthwise(f"{name}.pe", block.pe)
    heads, keys, values = block.num_heads, block.key_dim, block.head_dim
    if block.qkv.conv.out_channels != heads * (2 * keys + values) or block.pe.conv.out_channels != heads * values:
        raise RecipeError(f"prune: {name} has {heads} heads with {keys} keys and {values} values, which do not fit qkv")


def _wire_attention(flow: Flow, name: str, block: Attention, source: FeatureMap, tie: str) -> FeatureMap:
    slices: dict[str, int] = {}
    for head in range(block.num_heads):
        slices |= {f"{name}.qkv.qk{head}": 2 * block.key_dim, f"{name}.qkv.v{head}": block.head_dim}
    mixed = flow.conv(f"{name}.qkv", source, slices)
    flow.fixed |= set(mixed.slices[::2])
    values = FeatureMap(mixed.name, mixed.slices[1::2])
    flow.tie(tie, values)
    position = flow.conv(f"{name}.pe", values, why_float=IN_ATTENTION)
    attended = flow.sum(f"{name} (sum)", name, flow.new(name, values.slices), position)
    return flow.conv(f"{name}.proj", attended, why_float=IN_ATTENTION)


def check_psa_block(name: str, block: PSABlock) -> None:
    """Check that the channels of a block with attention can be removed.

    Raises:
        RecipeError: It has no shortcuts, or its heads do not fit its convolutions, or see `check_conv`.
    """
    if not block.add or len(block.ffn) != 2:
        raise RecipeError(f"prune: {name} is a PSABlock without shortcuts, expected one with them")
    _check_attention(f"{name}.attn", block.attn)
    for index, module in enumerate(block.ffn):
        check_conv(f"{name}.ffn.{index}", module)


def wire_psa_block(flow: Flow, name: str, block: PSABlock, stream: FeatureMap, tie: str) -> FeatureMap:
    """Add attention and a feed-forward part, each with a shortcut. `tie` is the key of the slices of `stream` in `Flow.ties`."""
    attended = _wire_attention(flow, f"{name}.attn", block.attn, stream, tie)
    stream = flow.add(name, stream, attended, ("attn",))
    return flow.add(name, stream, flow.conv(f"{name}.ffn.1", flow.conv(f"{name}.ffn.0", stream)), ("ffn",))


def _check_c2psa(name: str, block: C2PSA) -> None:
    check_conv(f"{name}.cv1", block.cv1)
    check_conv(f"{name}.cv2", block.cv2)
    for index, module in enumerate(block.m):
        check_inner(f"{name}.m.{index}", module, {PSABlock: check_psa_block})


def _wire_c2psa(flow: Flow, name: str, block: C2PSA, sources: list[FeatureMap]) -> FeatureMap:
    first, stream = wire_halves(flow, name, block, sources[0])
    for index, module in enumerate(block.m):
        stream = wire_psa_block(flow, f"{name}.m.{index}", module, stream, f"{name}.cv1")
    return flow.conv(f"{name}.cv2", flow.join(f"{name} (concat)", first, stream))


def _refresh(model: nn.Module) -> None:
    refresh_halves(model)
    for block in model.modules():
        if isinstance(block, Attention):
            block.head_dim = block.pe.conv.out_channels // block.num_heads


YOLO11 = Family(
    name="YOLO11",
    made_of="Conv, C3k2, C2PSA, SPPF, Upsample, Concat and a Detect head",
    layers={
        **COMMON,
        C3k2: Layer(_check_c3k2, _wire_c3k2),
        C2PSA: Layer(_check_c2psa, _wire_c2psa),
        Detect: detect.DETECT,
    },
    head=Detect,
    refresh=_refresh,
    for_export=split_by_sizes,
    yaml_layers=COMMON_NAMES | {"C3k2", "C2PSA"},
    yaml=re.compile(r"yolo11([nsmlx])([\w-]*)\.yaml"),
    yaml_file="11/yolo11{variant}.yaml",
    yaml_names="yolo11n.yaml to yolo11x.yaml",
    fits=detect.is_for_nms,
)
