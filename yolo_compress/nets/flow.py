"""Which convolution reads which tensor of a detector, and which tensors meet in a sum, a concatenation or a pool.

A tensor is named after the module that makes it: `model.2.cv1` for what the block gives after its activation, `model.2.m.0`
for the sum of a bottleneck with a shortcut, `images` for the input.
"""

from __future__ import annotations

IMAGES = "images"


class Flow:
    """The wiring of one model, written down layer by layer by the `wire` functions of its family.

    Attributes:
        root: Union-find over tensors, in the order of the model; tensors of one root meet somewhere.
        joined: (tensor, module in which it meets others).
        reads: Convolution -> the tensor that it reads, or "" where no layer makes it.
        bare: Convolutions that never compute in INT8 -> the reason.
        sums: Tensor made by a shortcut -> names of the children of its module whose chain is the branch:
            the module computes `x + branch(x)`.
    """

    def __init__(self) -> None:
        self.root: dict[str, str] = {}
        self.joined: list[tuple[str, str]] = []
        self.reads: dict[str, str] = {}
        self.bare: dict[str, str] = {}
        self.sums: dict[str, tuple[str, ...]] = {}

    def new(self, tensor: str) -> str:
        """Note a tensor; returns it."""
        self.root[tensor] = tensor
        return tensor

    def find(self, tensor: str) -> str:
        """The first tensor, in the order of the model, of all that this one meets directly or through others."""
        while self.root[tensor] != tensor:
            tensor = self.root[tensor]
        return tensor

    def conv(self, block: str, source: str) -> str:
        """A Conv block reads `source`; returns the tensor that it makes."""
        self.reads[f"{block}.conv"] = source
        return self.new(block)

    def output(self, conv: str, source: str, why: str) -> None:
        """A convolution of the head that stays in float, with the reason; nothing in the model reads what it makes."""
        self.reads[conv], self.bare[conv] = source, why

    def join(self, where: str, *tensors: str) -> str:
        """Tensors meet in the module `where`, which only moves or adds their values; returns the first."""
        first = min((self.find(tensor) for tensor in tensors), key=list(self.root).index)
        for tensor in tensors:
            self.root[self.find(tensor)] = first
        self.joined.append((tensors[0], where))
        return tensors[0]

    def shortcut(self, module: str, source: str, *branch: str) -> str:
        """A module adds its input to the chain of its children `branch`, Conv blocks all; returns the sum.

        Raises:
            ValueError: The module is a layer of `model.model` itself; quantisation replaces the module, and a layer must
                stay of its class.
        """
        if module.count(".") < 2:
            raise ValueError(f"{module} is a layer; a shortcut must be a module inside of one")
        last = source
        for child in branch:
            last = self.conv(f"{module}.{child}", last)
        self.join(f"{module} (sum)", source, last, self.new(module))
        self.sums[module] = branch
        return module
