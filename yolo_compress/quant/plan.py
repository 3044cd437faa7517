"""Decide which tensors of a detector are INT8, which of them share a scale, and which convolutions read them.

Tensors are named as in `nets.flow`. A tensor is quantised once, where it is computed, and all layers that read the tensor use the
INT8 values. No tensor is read both as INT8 and as float.

All inputs and the output of a sum or concatenation share a scale. Input and output of a pool, upsampling or chunk also share a
scale. Only then can these layers run in INT8. TensorRT moves a DequantizeLinear node forward through such a layer. If the scales
are equal, this node cancels with the next QuantizeLinear node (NVIDIA, "Working with Quantized Types"). NVIDIA measured 180 images
per second on YOLOv7 without shared scales and 207 with shared scales (yolo_deepstream).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from yolo_compress.errors import RecipeError
from yolo_compress.nets.families import flow_of
from yolo_compress.nets.flow import IMAGES, Flow

__all__ = ["IMAGES", "Group", "Plan", "plan"]

LEFT_IN_FLOAT = "left in float as asked"


@dataclass(frozen=True)
class Group:
    """A set of tensors that share a scale, and the convolutions that read these tensors.

    Attributes:
        tensors: names in the order of the model. The first name is also the name of the group.
        convs: convolutions that read one of the tensors, including output convolutions of the head.
        joins: names of the modules for which the tensors must share a scale: their sums, concatenations and pools.
        why_float: reason why the tensors are float. Empty: they are INT8.
    """

    tensors: tuple[str, ...]
    convs: tuple[str, ...]
    joins: tuple[str, ...] = ()
    why_float: str = ""

    @property
    def name(self) -> str:
        """Name of the group, which is the name of its first tensor."""
        return self.tensors[0]


@dataclass(frozen=True)
class Plan:
    """The precision, INT8 or float, of every convolution of a detector and of every tensor between layers, with reasons for float.

    Attributes:
        groups: all groups of tensors that share a scale, INT8 and float.
        reads: convolution -> the tensor that the convolution reads, or "" for the convolution of DFL.
        skipped: (convolution, reason) of each convolution that stays float.
        sums: output tensor of a block or layer with shortcuts -> its branches, see `nets.flow.Flow.sums`.
    """

    groups: tuple[Group, ...]
    reads: dict[str, str] = field(repr=False)
    skipped: tuple[tuple[str, str], ...]
    sums: dict[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict, repr=False)

    @cached_property
    def int8(self) -> tuple[Group, ...]:
        """The groups whose tensors are INT8."""
        return tuple(group for group in self.groups if not group.why_float)

    @cached_property
    def tensors(self) -> tuple[str, ...]:
        """The names of the INT8 tensors, group by group."""
        return tuple(tensor for group in self.int8 for tensor in group.tensors)

    @cached_property
    def convs(self) -> tuple[str, ...]:
        """The names of the INT8 convolutions, in the order of definition in the model."""
        floats = dict(self.skipped)
        return tuple(name for name in self.reads if name not in floats)

    def group_of(self, tensor: str) -> Group:
        """Return the group that contains the tensor `tensor`."""
        return next(group for group in self.groups if tensor in group.tensors)

    def rows(self) -> Iterator[tuple[str, str, str, str]]:
        """Yield the rows of the report's placement table: (tensor, "int8" or "float", name of its group, reason for float)."""
        for group in self.groups:
            readers = f"{len(group.convs)} convolution{'s' * (len(group.convs) != 1)}"
            why = group.why_float or f"read by {readers}"
            if group.joins and not group.why_float:
                why += f"; one scale: {', '.join(group.joins)}"
            for tensor in group.tensors:
                yield tensor, "float" if group.why_float else "int8", group.name, why


def plan(model: nn.Module, left: Collection[str] = ()) -> Plan:
    """Return the placement of a model: every tensor that a convolution reads is INT8, except before the outputs of the head.

    The inputs of the head's output convolutions and of DFL stay float. Boxes (0 to 640 px) and logits come from these convolutions.
    If their inputs were INT8, boxes would have the resolution of one INT8 step. Ultralytics' QAT leaves the same convolutions in
    float. Convolutions that only training uses are not in the plan, so they stay in float too.

    Args:
        model: A detector of a supported family, pruned or not, with or without fake quantisers. It is not changed.
        left: Names of groups to leave in float. All convolutions that read their tensors also stay float.

    Raises:
        RecipeError: A block belongs to no supported family, a name in `left` is unknown, or no tensor is left to quantise.
    """
    flow = flow_of(model, "quantise")
    groups = _groups(flow, left)
    if unknown := set(left) - {group.name for group in groups}:
        known = ", ".join(group.name for group in groups if not group.why_float or group.name in left)
        raise RecipeError(f"unknown group of tensors {', '.join(sorted(unknown))}, expected one of {known}")
    floats = {conv: group.why_float for group in groups if group.why_float for conv in group.convs}
    reasons = {
        name: flow.float_only.get(name) or floats.get(name, "")
        for name in flow.reads
        if name in flow.float_only or name in floats
    }
    placed = Plan(groups, flow.reads, tuple(reasons.items()), flow.sums)
    if not placed.convs:
        raise RecipeError(
            f"nothing to quantise: all {len(flow.reads)} convolutions of {type(model).__name__} stay float"
        )
    return placed


def _groups(flow: Flow, left: Collection[str]) -> tuple[Group, ...]:
    """Return the groups of tensors that share a scale, in the order of their first tensors.

    A group is float if only float convolutions read its tensors, or if its name is in `left`.
    """
    members: dict[str, list[str]] = {}
    for tensor in flow.root:
        members.setdefault(flow.find(tensor), []).append(tensor)
    found = []
    for root, tensors in members.items():
        convs = tuple(name for name, tensor in flow.reads.items() if tensor and flow.find(tensor) == root)
        joins = tuple(where for tensor, where in flow.joined if flow.find(tensor) == root)
        why = LEFT_IN_FLOAT if root in left else ""
        if all(name in flow.float_only for name in convs):
            why = f"read by {', '.join(convs)} alone" if convs else "read by nothing"
        found.append(Group(tuple(tensors), convs, joins, why))
    return tuple(found)
