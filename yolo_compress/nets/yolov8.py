"""The family of YOLOv8 detectors (n to x)."""

from __future__ import annotations

import re

from ultralytics.nn.modules import Bottleneck, C2f, Detect

from yolo_compress.nets import detect
from yolo_compress.nets.blocks import (
    COMMON,
    COMMON_NAMES,
    check_bottleneck,
    check_c2f,
    refresh_c2f,
    split_by_sizes,
    wire_bottleneck,
    wire_c2f,
)
from yolo_compress.nets.family import Family, Layer
from yolo_compress.nets.flow import FeatureMap, Flow


def _check_c2f(name: str, block: C2f) -> None:
    check_c2f(name, block, {Bottleneck: check_bottleneck})


def _wire_c2f(flow: Flow, name: str, block: C2f, sources: list[FeatureMap]) -> FeatureMap:
    return wire_c2f(flow, name, block, sources[0], wire_bottleneck)


YOLOV8 = Family(
    name="YOLOv8",
    made_of="Conv, C2f, SPPF, Upsample, Concat and a Detect head",
    layers={**COMMON, C2f: Layer(_check_c2f, _wire_c2f), Detect: detect.DETECT},
    head=Detect,
    refresh=refresh_c2f,
    for_export=split_by_sizes,
    strides=(8, 16, 32),
    # backbone layer = layer of the same stride whose output enters the head; the same in all sizes n to x
    deep_to_shallow=("model.4=model.15", "model.6=model.18", "model.9=model.21"),
    yaml_layers=COMMON_NAMES | {"C2f"},
    yaml=re.compile(r"yolov8([nsmlx])([\w-]*)\.yaml"),
    yaml_file="v8/yolov8{variant}.yaml",
    yaml_names="yolov8n.yaml to yolov8x.yaml",
)
