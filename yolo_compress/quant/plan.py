"""Where the codes are: which tensors of a detector are INT8, which of them share a scale, and which convolutions read them.

Tensors are named as in `nets.flow`. A tensor is quantised once, where it is made, and every reader reads the codes: no
tensor is read as INT8 and as float.

One scale holds for all that meets in a sum or a concatenation and for what a pool, an upsampling or a chunk passes on. Only
then do these layers work on codes: TensorRT moves a DequantizeLinear forward through them, and it cancels with the next
QuantizeLinear where the scales are equal (NVIDIA, "Working with Quantized Types"; measured by NVIDIA on YOLOv7, yolo_deepstream:
180 images a second without sharing, 207 with).
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

LEFT = "left in float as asked"


@dataclass(frozen=True)
class Group:
    """Tensors with one scale, and who reads them.

    Attributes:
        tensors: in the order of the network; the first names the group.
        convs: the convolutions that read any of them, output convolutions of the head too.
        joins: what made them one: modules whose sum, concatenation or pool they meet in.
        why_float: empty for INT8.
    """

    tensors: tuple[str, ...]
    convs: tuple[str, ...]
    joins: tuple[str, ...] = ()
    why_float: str = ""

    @property
    def name(self) -> str:
        """Of the group: its first tensor."""
        return self.tensors[0]


@dataclass(frozen=True)
class Plan:
    """Every tensor between two layers and every convolution of a detector, in INT8 or in float, with the reason."""

    groups: tuple[Group, ...]
    reads: dict[str, str] = field(repr=False)  # convolution -> the tensor it reads, or "" for DFL's
    skipped: tuple[tuple[str, str], ...]
    sums: dict[str, tuple[str, ...]] = field(default_factory=dict, repr=False)  # as `Flow.sums`

    @cached_property
    def int8(self) -> tuple[Group, ...]:
        """The groups with a scale."""
        return tuple(group for group in self.groups if not group.why_float)

    @cached_property
    def tensors(self) -> tuple[str, ...]:
        """The INT8 tensors, group by group."""
        return tuple(tensor for group in self.int8 for tensor in group.tensors)

    @cached_property
    def convs(self) -> tuple[str, ...]:
        """The INT8 convolutions, in the order of definition."""
        floats = dict(self.skipped)
        return tuple(name for name in self.reads if name not in floats)

    def group_of(self, tensor: str) -> Group:
        """The group that a tensor is in."""
        return next(group for group in self.groups if tensor in group.tensors)

    def rows(self) -> Iterator[tuple[str, str, str, str]]:
        """(tensor, "int8" or "float", group, why) for people."""
        for group in self.groups:
            readers = f"{len(group.convs)} convolution{'s' * (len(group.convs) != 1)}"
            why = group.why_float or f"read by {readers}"
            if group.joins and not group.why_float:
                why += f"; one scale: {', '.join(group.joins)}"
            for tensor in group.tensors:
                yield tensor, "float" if group.why_float else "int8", group.name, why


def plan(model: nn.Module, left: Collection[str] = ()) -> Plan:
    """Every tensor that a convolution reads in INT8, but what enters the head's bare output convolutions and DFL.

    Boxes (0 to 640 px) and logits leave through the output convolutions: a per-tensor INT8 step of their input would be
    the resolution of the boxes. Ultralytics' QAT leaves the same ones in float.

    Args:
        model: A detector of a supported family, pruned or not, fake-quantised or not. Not changed.
        left: Names of groups to leave in float, with all convolutions that read them.

    Raises:
        RecipeError: A block of no supported family (names it), a group of `left` that there is not, or nothing left to quantise.
    """
    flow = flow_of(model)
    groups = _groups(flow, left)
    if unknown := set(left) - {group.name for group in groups}:
        known = ", ".join(group.name for group in groups if not group.why_float or group.name in left)
        raise RecipeError(f"no group of tensors is named {', '.join(sorted(unknown))}; there are {known}")
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
    """In the order of the first tensors; a group is float if only float convolutions read it, or if it is in `left`."""
    members: dict[str, list[str]] = {}
    for tensor in flow.root:
        members.setdefault(flow.find(tensor), []).append(tensor)
    found = []
    for root, tensors in members.items():
        convs = tuple(name for name, tensor in flow.reads.items() if tensor and flow.find(tensor) == root)
        joins = tuple(where for tensor, where in flow.joined if flow.find(tensor) == root)
        why = LEFT if root in left else ""
        if all(name in flow.float_only for name in convs):
            why = f"read by {', '.join(convs)} alone" if convs else "read by nothing"
        found.append(Group(tuple(tensors), convs, joins, why))
    return tuple(found)
