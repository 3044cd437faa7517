"""Where the codes are: which tensors of a detector are INT8, which of them share a scale, and which convolutions read them.

A tensor is named after the module that makes it: `model.2.cv1` for what the block gives after its activation, `model.2.m.0` for
the sum of a bottleneck with a shortcut, `images` for the input. It is quantised once, where it is made, and every reader
reads the codes: no tensor is read as INT8 and as float.

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
from yolo_compress.nets.blocks import SPPF, Bottleneck, C2f, Concat, Conv, Detect

IMAGES = "images"
OUTPUT_CONV = "output convolution of the head: boxes and logits keep float resolution"
DFL_CONV = "DFL: the expectation over bins of the box decode"
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
        model: A YOLOv8 detector, pruned or not, fake-quantised or not. Not changed.
        left: Names of groups to leave in float, with all convolutions that read them.

    Raises:
        RecipeError: A block that is not YOLOv8's (names it), a group of `left` that there is not, or nothing left to quantise.
    """
    flow = _Flow(model)
    groups = flow.groups(left)
    if unknown := set(left) - {group.name for group in groups}:
        known = ", ".join(group.name for group in groups if not group.why_float or group.name in left)
        raise RecipeError(f"no group of tensors is named {', '.join(sorted(unknown))}; there are {known}")
    floats = {conv: group.why_float for group in groups if group.why_float for conv in group.convs}
    reasons = {
        name: flow.bare.get(name) or floats.get(name, "") for name in flow.reads if name in flow.bare or name in floats
    }
    placed = Plan(groups, flow.reads, tuple(reasons.items()))
    if not placed.convs:
        raise RecipeError(
            f"nothing to quantise: all {len(flow.reads)} convolutions of {type(model).__name__} stay float"
        )
    return placed


class _Flow:
    """Walks the layers as their `forward` does, and notes who reads what and what has to share a scale."""

    def __init__(self, model: nn.Module) -> None:
        self.root: dict[str, str] = {}  # union-find over tensors
        self.joined: list[tuple[str, str]] = []  # (tensor, module that joined it with others)
        self.reads: dict[str, str] = {}
        self.bare: dict[str, str] = {}  # convolutions that stay float, with the reason
        layers = getattr(model, "model", None)
        if not isinstance(layers, nn.Sequential) or not len(layers):
            raise RecipeError(f"quantise: {type(model).__name__} is not an Ultralytics model with a `model` sequence")
        made: list[str] = []  # the tensor that each layer gives
        for index, layer in enumerate(layers):
            given = layer.f if isinstance(layer.f, (list, tuple)) else [layer.f]
            sources = [made[index + f] if f < 0 and index + f >= 0 else IMAGES if f < 0 else made[f] for f in given]
            if index == 0:
                self._new(IMAGES)
            made.append(self._layer(f"model.{index}", layer, sources))

    def _new(self, tensor: str) -> str:
        self.root[tensor] = tensor
        return tensor

    def _find(self, tensor: str) -> str:
        while self.root[tensor] != tensor:
            tensor = self.root[tensor]
        return tensor

    def _join(self, where: str, *tensors: str) -> str:
        first = min((self._find(tensor) for tensor in tensors), key=list(self.root).index)
        for tensor in tensors:
            self.root[self._find(tensor)] = first
        self.joined.append((tensors[0], where))
        return tensors[0]

    def _layer(self, name: str, layer: nn.Module, sources: list[str]) -> str:
        if type(layer) is Conv:
            return self._conv(name, sources[0])
        if type(layer) is C2f:
            return self._c2f(name, layer, sources[0])
        if type(layer) is SPPF and not getattr(layer, "add", False):
            pooled = self._conv(f"{name}.cv1", sources[0])
            self._join(f"{name} (pools)", pooled)
            return self._conv(f"{name}.cv2", pooled)
        if isinstance(layer, Concat):
            return self._join(name, *sources)
        if isinstance(layer, nn.Upsample):
            return sources[0]
        if type(layer) is Detect:
            return self._detect(name, layer, sources)
        raise RecipeError(
            f"quantise: {name} is a {type(layer).__name__}; supported are YOLOv8's Conv, C2f, SPPF, Upsample, Concat, Detect"
        )

    def _conv(self, name: str, source: str) -> str:
        self.reads[f"{name}.conv"] = source
        return self._new(name)

    def _c2f(self, name: str, block: C2f, source: str) -> str:
        parts = [self._conv(f"{name}.cv1", source)]  # its two halves are one tensor
        for index, bottleneck in enumerate(block.m):
            inner = f"{name}.m.{index}"
            branch = self._conv(f"{inner}.cv2", self._conv(f"{inner}.cv1", parts[-1]))
            if bottleneck.add:
                self._join(f"{inner} (sum)", parts[-1], branch, self._new(inner))
                branch = inner
            parts.append(branch)
        return self._conv(f"{name}.cv2", self._join(f"{name} (concat)", *parts))

    def _detect(self, name: str, head: Detect, sources: list[str]) -> str:
        for branches in ("cv2", "cv3"):
            for level, source in enumerate(sources):
                self._branch(f"{name}.{branches}.{level}", getattr(head, branches)[level], source)
        if isinstance(head.dfl, nn.Module) and not isinstance(head.dfl, nn.Identity):
            self.reads[f"{name}.dfl.conv"], self.bare[f"{name}.dfl.conv"] = "", DFL_CONV
        return name

    def _branch(self, name: str, layers: nn.Sequential, source: str) -> None:
        for index, layer in enumerate(layers):
            inner = f"{name}.{index}"
            if isinstance(layer, Conv):
                source = self._conv(inner, source)
            elif isinstance(layer, nn.Conv2d):
                self.reads[inner], self.bare[inner] = source, OUTPUT_CONV
            else:
                raise RecipeError(f"quantise: {inner} is a {type(layer).__name__}; supported is YOLOv8's Detect head")

    def groups(self, left: Collection[str]) -> tuple[Group, ...]:
        """In the order of the first tensors; a group is float if only float convolutions read it, or if it is in `left`."""
        members: dict[str, list[str]] = {}
        for tensor in self.root:
            members.setdefault(self._find(tensor), []).append(tensor)
        found = []
        for root, tensors in members.items():
            convs = tuple(name for name, tensor in self.reads.items() if tensor and self._find(tensor) == root)
            joins = tuple(where for tensor, where in self.joined if self._find(tensor) == root)
            why = LEFT if root in left else ""
            if all(name in self.bare for name in convs):
                why = f"read by {', '.join(convs)} alone" if convs else "read by nothing"
            found.append(Group(tuple(tensors), convs, joins, why))
        return tuple(found)


def is_sum(module: nn.Module) -> bool:
    """Whether the module adds a shortcut: a stock bottleneck that does."""
    return isinstance(module, Bottleneck) and module.add
