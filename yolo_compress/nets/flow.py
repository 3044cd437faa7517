"""Data flow of a detector: what each convolution reads, which tensors meet, and which channels have to be removed together.

A tensor has the name of the module that outputs it. `model.2.cv1` is the output of this Conv block after the activation.
`model.2.m.0` is the sum of a bottleneck with a shortcut. `images` is the input of the model. A factorised block (`nets.factors`)
has a tensor after each of its factors, and the last one is the output of the block.

The channels of a tensor are slices. A slice is a run of channels that one convolution writes. A concatenation puts the slices of
its inputs one after the other. In a sum the slices of both inputs are the same channels, so they have to be removed together. A
depthwise convolution does not mix channels, so its channels are those of its input.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from yolo_compress.errors import RecipeError
from yolo_compress.nets.conv import norm_after
from yolo_compress.nets.factors import factor_names, output_channels

IMAGES = "images"
WHOLE_LAYER: tuple[tuple[str, ...], ...] = (
    (),
)  # in `Flow.sums`: the layer adds its input to the output of its last block


@dataclass(frozen=True)
class Member:
    """The part of a module that holds the channels of a slice: as many channels as the slice has, starting at channel `offset`.

    The side `role` tells whether they are output channels, input channels or BatchNorm features. The input channels of a depthwise
    convolution are its output channels, so it has no role "in".
    """

    module: str
    role: Literal["out", "in", "norm"]  # output or input channels of a Conv2d, features of a BatchNorm2d
    offset: int


@dataclass(frozen=True)
class FeatureMap:
    """A tensor between layers: its name, and the names of the slices that its channels consist of, in order."""

    name: str
    slices: tuple[str, ...]


@dataclass(frozen=True)
class Chain:
    """The bottlenecks of a layer such as C2f. Each reads the output of the one before. One convolution reads all outputs.

    A bottleneck is an entry of the layer's list `m`. Without its last bottlenecks the layer keeps its class, and all other modules
    read what they read before, except `reader`, which has fewer input channels.

    Attributes:
        reader: Name of the convolution that reads the concatenation of the bottlenecks' outputs.
        bottlenecks: Names of the bottlenecks, in order.
        ends: Number of channels that `reader` reads if the first 0, 1, 2, ... bottlenecks are there.
    """

    reader: str
    bottlenecks: tuple[str, ...]
    ends: tuple[int, ...]


class Flow:
    """Data flow of one model. The `wire` functions of its family fill it, layer by layer.

    Args:
        model: The model. Only the shapes of its convolutions are read.

    Attributes:
        root: Parent links of a union-find over tensors, in the order of the model. Tensors with the same root are connected
            by sums, concatenations or pools.
        joined: (tensor, name of the module in which the tensor is summed, concatenated or pooled).
        reads: Convolution -> its input tensor, or "" if no layer outputs that tensor.
        float_only: Convolution that always stays in float -> the reason.
        sums: Output tensor of a module with shortcuts -> for each of its sums in order, the child modules that form the branch.
            The module computes `x = x + branch(x)` once for each branch. `WHOLE_LAYER` stands for a layer with one shortcut.
        outputs: Names of the convolutions whose output channels are the model's outputs.
        training: Names of the convolutions that only training uses (`only_trained`). They are in no other attribute but `members`.
        widths: Slice -> number of channels.
        members: Slice -> the parts of modules that hold these channels. Slices that are summed have one entry.
        ties: Slice -> key of the set of slices that must lose equal shares of their channels.
        fixed: Slices that cannot be removed.
        chains: Layer -> its bottlenecks, for the layers that can lose the last of them. They may have none left.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())
        self.root: dict[str, str] = {}
        self.joined: list[tuple[str, str]] = []
        self.reads: dict[str, str] = {}
        self.float_only: dict[str, str] = {}
        self.sums: dict[str, tuple[tuple[str, ...], ...]] = {}
        self.outputs: list[str] = []
        self.training: set[str] = set()
        self.widths: dict[str, int] = {}
        self.members: dict[str, dict[Member, None]] = {}
        self.ties: dict[str, str] = {}
        self.fixed: set[str] = set()
        self.chains: dict[str, Chain] = {}
        self._same: dict[str, str] = {}  # slice -> the earlier slice that it is summed with
        self._only_trained = False

    def new(self, tensor: str, slices: tuple[str, ...] = ()) -> FeatureMap:
        """Add a tensor and return it."""
        if not self._only_trained:
            self.root.setdefault(tensor, tensor)
        return FeatureMap(tensor, slices)

    @contextmanager
    def only_trained(self) -> Iterator[None]:
        """Inside the `with` block, `conv` and `output` add convolutions that only training uses.

        The slices that they write are fixed. Their inputs follow the layers that write them.
        """
        self._only_trained = True
        try:
            yield
        finally:
            self._only_trained = False

    def find(self, tensor: str) -> str:
        """Return the root of a tensor: the first tensor in the order of the model that is connected with `tensor`."""
        while self.root[tensor] != tensor:
            tensor = self.root[tensor]
        return tensor

    def conv(
        self, block: str, source: FeatureMap, slices: Mapping[str, int] | None = None, why_float: str = ""
    ) -> FeatureMap:
        """Add a Conv block that reads the tensor `source`, and return its output tensor.

        Args:
            block: Name of the block.
            source: Input tensor.
            slices: Name -> number of channels of each slice of the output. If None, the output is one slice, called `block`.
                A depthwise convolution has the slices of its input.
            why_float: Reason why the convolution always stays in float; empty if it can be INT8.
        """
        *inner, last = factor_names(block, self._modules[block])
        for factor in inner:
            source = self._conv(factor, source, {factor: output_channels(self._modules[factor])}, why_float)
        return self._conv(last, source, slices or {block: output_channels(self._modules[last])}, why_float)

    def _conv(self, block: str, source: FeatureMap, sizes: Mapping[str, int], why_float: str) -> FeatureMap:
        """Add one Conv block that is not factorised. `sizes` are the slices of its output; a depthwise one ignores them."""
        name = f"{block}.conv"
        conv: Any = self._modules[name]
        if self._only_trained:
            self.training.add(name)
        else:
            self.reads[name] = source.name
            if why_float:
                self.float_only[name] = why_float
        if conv.groups > 1:
            made = source.slices
        else:
            self._hold(name, "in", source.slices)
            self.widths.update(sizes)
            self.members.update({piece: {} for piece in sizes})
            made = tuple(sizes)
            if self._only_trained:
                self.fixed |= set(made)
        self._hold(name, "out", made)
        if norm_after(self._modules, name) is not None:
            self._hold(f"{block}.bn", "norm", made)
        return self.new(block, made)

    def output(self, conv: str, source: FeatureMap | None, why: str) -> None:
        """Add a convolution of the head that stays in float for the reason `why`. No layer reads its output."""
        if self._only_trained:
            self.training.add(conv)
        else:
            self.reads[conv], self.float_only[conv] = source.name if source else "", why
            self.outputs.append(conv)
        if source:
            self._hold(conv, "in", source.slices)

    def split(self, tensor: FeatureMap) -> list[FeatureMap]:
        """Return the slices of a tensor as feature maps. They count as one tensor, so they share an INT8 scale."""
        return [FeatureMap(tensor.name, (piece,)) for piece in tensor.slices]

    def join(self, where: str, *tensors: FeatureMap) -> FeatureMap:
        """Return the concatenation of the tensors that the module called `where` reads. It computes nothing, such as `Concat`."""
        self._connect(where, *(tensor.name for tensor in tensors))
        return FeatureMap(tensors[0].name, tuple(piece for tensor in tensors for piece in tensor.slices))

    def sum(self, where: str, into: str, *tensors: FeatureMap) -> FeatureMap:
        """Connect the tensors that the module `where` sums, and return the sum, a tensor with the name `into`.

        Raises:
            RecipeError: The tensors do not consist of slices of the same widths.
        """
        self.new(into)
        self._connect(where, *(tensor.name for tensor in tensors), into)
        widths = [[self.widths[piece] for piece in tensor.slices] for tensor in tensors]
        if any(row != widths[0] for row in widths):
            raise RecipeError(
                f"{where} adds tensors of slices of {' and '.join(map(str, widths))} channels, expected equal ones"
            )
        for pieces in zip(*(tensor.slices for tensor in tensors), strict=True):
            first, *others = sorted({self.first(piece) for piece in pieces}, key=list(self.members).index)
            for other in others:
                self._same[other] = first
                self.members[first] |= self.members.pop(other)
        return FeatureMap(into, tensors[0].slices)

    def shortcut(self, module: str, source: FeatureMap, *branch: str) -> FeatureMap:
        """Add a module that computes `x + branch(x)`, and return the sum.

        Args:
            module: Name of the module.
            source: Input tensor.
            branch: Names of the child Conv blocks that form the branch, in order.

        Raises:
            ValueError: See `add`.
        """
        last = source
        for child in branch:
            last = self.conv(f"{module}.{child}", last)
        return self.add(module, source, last, branch)

    def add(self, module: str, source: FeatureMap, last: FeatureMap, branch: tuple[str, ...]) -> FeatureMap:
        """Add the sum `source + last` of a module, and return it. A module can have several sums, one after the other.

        Args:
            module: Name of the module, also of its sums.
            source: Input of the branch.
            last: Output of the branch.
            branch: Names of the child modules that form the branch, in order.

        Raises:
            ValueError: The module is a layer of `model.model`. Quantisation replaces the module, but the class of a layer must
                not change. Use `add_layer`.
        """
        if module.count(".") < 2:
            raise ValueError(f"{module} is a layer; a shortcut must be a module inside a layer")
        self.sums[module] = (*self.sums.get(module, ()), branch)
        return self.sum(f"{module} (sum)", module, source, last)

    def chain(self, layer: str, reader: str, always: Sequence[FeatureMap], outputs: Mapping[str, FeatureMap]) -> None:
        """Declare that a layer can lose its last bottlenecks.

        Args:
            layer: Name of the layer.
            reader: Name of the block that reads the concatenation of `always` and `outputs`, in this order.
            always: Tensors that stay.
            outputs: Name of each bottleneck -> its output, in order.
        """
        ends = [sum(map(self._width, always))]
        for output in outputs.values():
            ends.append(ends[-1] + self._width(output))
        first = factor_names(reader, self._modules[reader])[0]
        self.chains[layer] = Chain(f"{first}.conv", tuple(outputs), tuple(ends))

    def add_layer(self, layer: str, source: FeatureMap, last: FeatureMap) -> FeatureMap:
        """Add the sum `source + last` of a layer whose attribute `add` says that it has this shortcut, and return the sum.

        Args:
            layer: Name of the layer of `model.model`, also of the sum.
            source: Input of the layer.
            last: Output of the last block of the layer.
        """
        self.sums[layer] = WHOLE_LAYER
        return self.sum(f"{layer} (sum)", layer, source, last)

    def tie(self, key: str, *tensors: FeatureMap) -> None:
        """Demand that all slices of these tensors lose equal shares of their channels."""
        self.ties |= dict.fromkeys((piece for tensor in tensors for piece in tensor.slices), key)

    def first(self, piece: str) -> str:
        """Of the slices that are summed with `piece`, directly or indirectly, return the one that comes first in the model."""
        while piece in self._same:
            piece = self._same[piece]
        return piece

    def _width(self, tensor: FeatureMap) -> int:
        return sum(self.widths[piece] for piece in tensor.slices)

    def _connect(self, where: str, *tensors: str) -> None:
        first = min((self.find(tensor) for tensor in tensors), key=list(self.root).index)
        for tensor in tensors:
            self.root[self.find(tensor)] = first
        self.joined.append((tensors[0], where))

    def _hold(self, module: str, role: Literal["out", "in", "norm"], slices: tuple[str, ...]) -> None:
        offset = 0
        for piece in slices:
            self.members[self.first(piece)][Member(module, role, offset)] = None
            offset += self.widths[piece]
