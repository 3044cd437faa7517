"""The family of YOLOv8 detectors (n to x), also with levels of stride 4 (P2) or 64 (P6), where C2 takes the place of C2f."""

from __future__ import annotations

import re

from ultralytics.nn.modules import C2, Bottleneck, C2f, Detect

from yolo_compress.nets import detect
from yolo_compress.nets.blocks import (
    COMMON,
    COMMON_NAMES,
    check_bottleneck,
    check_c2f,
    refresh_halves,
    split_by_sizes,
    wire_bottleneck,
    wire_c2f,
    wire_halves,
)
from yolo_compress.nets.family import Family, Layer
from yolo_compress.nets.flow import FeatureMap, Flow


def _check_c2f(name: str, block: C2f | C2) -> None:
    check_c2f(name, block, {Bottleneck: check_bottleneck})


def _wire_c2f(flow: Flow, name: str, block: C2f, sources: list[FeatureMap]) -> FeatureMap:
    return wire_c2f(flow, name, block, sources[0], wire_bottleneck)


def _wire_c2(flow: Flow, name: str, block: C2, sources: list[FeatureMap]) -> FeatureMap:
    deep, shallow = wire_halves(flow, name, block, sources[0])
    for index, module in enumerate(block.m):
        deep = wire_bottleneck(flow, f"{name}.m.{index}", module, deep)
    return flow.conv(f"{name}.cv2", flow.join(f"{name} (concat)", deep, shallow))


YOLOV8 = Family(
    name="YOLOv8",
    made_of="Conv, C2f, C2, SPPF, Upsample, Concat and a Detect head",
    layers={**COMMON, C2f: Layer(_check_c2f, _wire_c2f), C2: Layer(_check_c2f, _wire_c2), Detect: detect.DETECT},
    head=Detect,
    refresh=refresh_halves,
    for_export=split_by_sizes,
    yaml_layers=COMMON_NAMES | {"C2f", "C2"},
    yaml=re.compile(r"yolov8([nsmlx])([\w-]*)\.yaml"),
    yaml_file="v8/yolov8{variant}.yaml",
    yaml_names="yolov8n.yaml to yolov8x.yaml",
    fits=detect.is_for_nms,
)
