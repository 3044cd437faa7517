"""The channel groups of YOLOv8 are those that Torch-Pruning's DepGraph finds (Fang et al., arXiv 2301.12900), which traces autograd.

DepGraph cannot follow `chunk`, so each C2f is given to it with two convolutions in place of the one that is chunked.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from ultralytics.nn.modules import C2f, Conv

from yolo_compress.nets import detect
from yolo_compress.prune.graph import Member, prunable
from yolo_compress.train import checkpoint

torch_pruning = pytest.importorskip("torch_pruning")


class SplitC2f(nn.Module):
    """A C2f whose first convolution is two, `a` for the concatenation alone and `b` for the bottlenecks too."""

    def __init__(self, block: C2f) -> None:
        super().__init__()
        read, half = block.cv1.conv.in_channels, block.cv1.conv.out_channels // 2
        self.a, self.b = Conv(read, half), Conv(read, half)
        self.cv2, self.m = block.cv2, block.m
        self.i, self.f, self.type, self.np = block.i, block.f, block.type, block.np  # read by Ultralytics' forward

    def forward(self, x_BCHW: Tensor) -> Tensor:
        parts = [self.a(x_BCHW), self.b(x_BCHW)]
        parts.extend(bottleneck(parts[-1]) for bottleneck in self.m)
        return self.cv2(torch.cat(parts, 1))


def split(model: Any) -> dict[str, tuple[str, int]]:
    """Split the blocks in place. Return module of the split model -> module and channel offset in the stock model."""
    stock = {}
    for name, block in list(model.named_modules()):
        if isinstance(block, C2f):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, SplitC2f(block))
            half = block.cv1.conv.out_channels // 2
            for part, offset in (("a", 0), ("b", half)):
                stock |= {f"{name}.{part}.{layer}": (f"{name}.cv1.{layer}", offset) for layer in ("conv", "bn")}
    return stock


def traced(model: Any) -> Any:
    with warnings.catch_warnings(action="ignore"), torch.enable_grad():
        return torch_pruning.DependencyGraph().build_dependency(
            model, torch.zeros(1, 3, 64, 64), forward_fn=detect.raw_outputs, unwrapped_parameters=[], verbose=False
        )


def by_depgraph(model: Any) -> set[frozenset[Member]]:
    """Return the members of every group, except of those that end in the outputs or begin in the image."""
    stock, found = split(model), set()
    graph = traced(model)
    names = {module: name for name, module in model.named_modules()}
    outputs = {f"model.22.{branch}.{level}.2" for branch in ("cv2", "cv3") for level in range(3)} | {
        "model.22.dfl.conv"
    }
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d) or module not in graph.module2node or name in outputs:
            continue
        group = graph.get_pruning_group(module, torch_pruning.prune_conv_out_channels, list(range(module.out_channels)))
        members = set()
        for item in group.items:
            layer = item.dep.target.module
            if not isinstance(layer, nn.Conv2d | nn.BatchNorm2d):
                continue
            own, shift = stock.get(names[layer], (names[layer], 0))
            is_norm = isinstance(layer, nn.BatchNorm2d)
            role = "norm" if is_norm else "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
            for offset in {index - root for index, root in zip(item.idxs, item.root_idxs, strict=True)}:
                members.add(Member(own, role, offset + (shift if role != "in" else 0)))
        found.add(frozenset(members))
    return found


@pytest.mark.parametrize("size", ["n", "m"])
def test_the_groups_are_those_of_depgraph(size: str) -> None:
    model = checkpoint.new_model(f"yolov8{size}.yaml", ("a", "b"), 3, 0).eval()
    groups = {frozenset(group.members) for group in prunable(model)}
    expected = by_depgraph(model)
    assert groups == expected and len(groups) > 40
