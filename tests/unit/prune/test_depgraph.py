"""The channel groups of a model are those that Torch-Pruning's DepGraph finds (Fang et al., arXiv 2301.12900), which traces autograd.

DepGraph cannot follow `chunk`, so each C2f is given to it with two convolutions in place of the one that is chunked. It cannot follow
attention either, so attention is left out.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from ultralytics.nn.modules import C2PSA, C2f, Conv
from ultralytics.nn.modules.block import Attention

from yolo_compress.nets import detect
from yolo_compress.nets.families import flow_of
from yolo_compress.prune.graph import Member, prunable
from yolo_compress.train import checkpoint

torch_pruning = pytest.importorskip("torch_pruning")


class SplitC2f(nn.Module):
    """A C2f or C2PSA whose first convolution is two, `a` for the concatenation alone and `b` for the inner blocks too."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        read, half = block.cv1.conv.in_channels, block.cv1.conv.out_channels // 2
        self.a, self.b = Conv(read, half), Conv(read, half)
        self.cv2, self.m, self.last = block.cv2, block.m, isinstance(block, C2PSA)
        self.i, self.f, self.type, self.np = block.i, block.f, block.type, block.np  # read by Ultralytics' forward

    def forward(self, x_BCHW: Tensor) -> Tensor:
        parts = [self.a(x_BCHW), self.b(x_BCHW)]
        parts.extend(bottleneck(parts[-1]) for bottleneck in self.m)
        return self.cv2(torch.cat([parts[0], parts[-1]] if self.last else parts, 1))


def split(model: Any) -> dict[str, tuple[str, int]]:
    """Split the blocks in place. Return module of the split model -> module and channel offset in the stock model."""
    stock = {}
    for name, block in list(model.named_modules()):
        if isinstance(block, Attention):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Identity())
        if isinstance(block, C2f | C2PSA):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, SplitC2f(block))
            half = block.cv1.conv.out_channels // 2
            for part, offset in (("a", 0), ("b", half)):
                stock |= {f"{name}.{part}.{layer}": (f"{name}.cv1.{layer}", offset) for layer in ("conv", "bn")}
    return stock


def traced(model: Any) -> Any:
    with warnings.catch_warnings(action="ignore"), torch.enable_grad():
        return torch_pruning.DependencyGraph().build_dependency(
            model, torch.zeros(1, 3, 64, 64), forward_fn=raw_outputs, unwrapped_parameters=[], verbose=False
        )


def raw_outputs(model: Any, images_BCHW: Tensor) -> list[Tensor]:
    """Return the outputs of every branch in evaluation mode: in training the one-to-one branches are detached from the neck."""
    return [raw[name] for raw in detect.by_branch(model(images_BCHW)[1]).values() for name in ("boxes", "scores")]


def by_depgraph(model: Any) -> set[frozenset[Member]]:
    """Return the members of every group, except of those that end in the outputs or begin in the image or only serve training."""
    flow = flow_of(model, "prune")
    stock, found = split(model), set()
    graph = traced(model)
    names = {module: name for name, module in model.named_modules()}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d) or module not in graph.module2node or module.groups > 1:
            continue
        if name in flow.outputs or name in flow.training:
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


@pytest.mark.parametrize("yaml", ["yolov8n.yaml", "yolov8m.yaml", "yolo11n.yaml", "yolo26n.yaml", "yolo26m.yaml"])
def test_the_groups_are_those_of_depgraph(yaml: str) -> None:
    model = checkpoint.new_model(yaml, ("a", "b"), 3, 0).eval()
    groups = {
        frozenset(member for member in group.members if ".attn." not in member.module) for group in prunable(model)
    } - {frozenset()}
    expected = by_depgraph(model)
    assert groups == expected and len(groups) > 40
