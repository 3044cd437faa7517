"""Data flow of a detector: the input tensor of each convolution, and the tensors that share a sum, concatenation or pool.

A tensor has the name of the module that outputs it. `model.2.cv1` is the output of this Conv block after the activation.
`model.2.m.0` is the sum of a bottleneck with a shortcut. `images` is the input of the model.
"""

from __future__ import annotations

IMAGES = "images"


class Flow:
    """Data flow of one model. The `wire` functions of its family fill it, layer by layer.

    Attributes:
        root: Parent links of a union-find over tensors, in the order of the model. Tensors with the same root are connected
            by sums, concatenations or pools.
        joined: (tensor, name of the module in which the tensor is summed, concatenated or pooled).
        reads: Convolution -> its input tensor, or "" if no layer outputs that tensor.
        float_only: Convolution that always stays in float -> the reason.
        sums: Output tensor of a module with a shortcut -> names of the child modules that form the branch, in order.
            The module computes `x + branch(x)`.
    """

    def __init__(self) -> None:
        self.root: dict[str, str] = {}
        self.joined: list[tuple[str, str]] = []
        self.reads: dict[str, str] = {}
        self.float_only: dict[str, str] = {}
        self.sums: dict[str, tuple[str, ...]] = {}

    def new(self, tensor: str) -> str:
        """Add a tensor and return its name."""
        self.root[tensor] = tensor
        return tensor

    def find(self, tensor: str) -> str:
        """Return the root of a tensor: the first tensor in the order of the model that is connected with `tensor`."""
        while self.root[tensor] != tensor:
            tensor = self.root[tensor]
        return tensor

    def conv(self, block: str, source: str) -> str:
        """Add a Conv block that reads the tensor `source`, and return its output tensor."""
        self.reads[f"{block}.conv"] = source
        return self.new(block)

    def output(self, conv: str, source: str, why: str) -> None:
        """Add a convolution of the head that stays in float for the reason `why`. No layer reads its output."""
        self.reads[conv], self.float_only[conv] = source, why

    def join(self, where: str, *tensors: str) -> str:
        """Connect the tensors that enter the module `where`, and return the first tensor. The module only moves or adds values."""
        first = min((self.find(tensor) for tensor in tensors), key=list(self.root).index)
        for tensor in tensors:
            self.root[self.find(tensor)] = first
        self.joined.append((tensors[0], where))
        return tensors[0]

    def shortcut(self, module: str, source: str, *branch: str) -> str:
        """Add a module that computes `x + branch(x)`, and return the name of the sum's tensor.

        Args:
            module: Name of the module.
            source: Input tensor.
            branch: Names of the child Conv blocks that form the branch, in order.

        Raises:
            ValueError: The module is a layer of `model.model`. Quantisation replaces the module, but the class of a layer must
                not change.
        """
        if module.count(".") < 2:
            raise ValueError(f"{module} is a layer; a shortcut must be a module inside a layer")
        last = source
        for child in branch:
            last = self.conv(f"{module}.{child}", last)
        self.join(f"{module} (sum)", source, last, self.new(module))
        self.sums[module] = branch
        return module
