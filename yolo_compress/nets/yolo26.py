"""The family of YOLO26 detectors (n to x): layers of YOLO11, attention also in a C3k2, and an end-to-end head without bins.

The SPPF has a shortcut. `nets.detect` describes the head.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from torch import nn
from ultralytics.nn.modules import Bottleneck, C3k2
from ultralytics.nn.modules.block import C3k, PSABlock

from yolo_compress.errors import RecipeError
from yolo_compress.nets import detect
from yolo_compress.nets.blocks import check_bottleneck, check_c2f, check_inner, wire_bottleneck, wire_c2f
from yolo_compress.nets.family import Layer
from yolo_compress.nets.flow import FeatureMap, Flow
from yolo_compress.nets.yolo11 import YOLO11, check_c3k, check_psa_block, wire_c3k, wire_psa_block


def _check_attended(name: str, block: nn.Sequential) -> None:
    """Check a bottleneck followed by attention. Both have shortcuts, so their outputs have the channels of their input."""
    if [type(part) for part in block] != [Bottleneck, PSABlock] or not block[0].add:
        kinds = " and ".join(type(part).__name__ for part in block)
        raise RecipeError(f"prune: {name} is {kinds}, expected a Bottleneck with a shortcut and a PSABlock")
    check_inner(f"{name}.0", block[0], {Bottleneck: check_bottleneck})
    check_inner(f"{name}.1", block[1], {PSABlock: check_psa_block})


def _check_c3k2(name: str, block: C3k2) -> None:
    check_c2f(name, block, {Bottleneck: check_bottleneck, C3k: check_c3k, nn.Sequential: _check_attended})


def _wire_c3k2(flow: Flow, name: str, block: C3k2, sources: list[FeatureMap]) -> FeatureMap:
    def wire_inner(flow: Flow, inner: str, block: Any, source: FeatureMap) -> FeatureMap:
        if isinstance(block, nn.Sequential):
            stream = wire_bottleneck(flow, f"{inner}.0", block[0], source)
            return wire_psa_block(flow, f"{inner}.1", block[1], stream, f"{name}.cv1")
        return (wire_c3k if isinstance(block, C3k) else wire_bottleneck)(flow, inner, block, source)

    return wire_c2f(flow, name, block, sources[0], wire_inner)


YOLO26 = replace(
    YOLO11,
    name="YOLO26",
    made_of="Conv, C3k2, C2PSA, SPPF, Upsample, Concat and an end-to-end Detect head",
    layers={**YOLO11.layers, C3k2: Layer(_check_c3k2, _wire_c3k2)},
    yaml=re.compile(r"yolo26([nsmlx])([\w-]*)\.yaml"),
    yaml_file="26/yolo26{variant}.yaml",
    yaml_names="yolo26n.yaml to yolo26x.yaml",
    fits=detect.is_end_to_end,
)
