"""The ranges of a quantised network as plain data: what QAT and PTQ hand to export, and nothing of any library.

A range is an `amax`: codes are `round(x * qmax / amax)`, symmetric, zero point 0, so `scale = amax / qmax`. `qmax` is 127 for
activations and `QuantState.weight_qmax` for weights. Every form of the INT8 net holds these codes and no others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from yolo_compress.errors import CorruptArtifact, NumericsError
from yolo_compress.files import strict_json
from yolo_compress.nets.conv import norm_after
from yolo_compress.quant.plan import Group

VERSION = 3  # 3: weight_bits
QMAX = 127  # symmetric INT8
# x86 without VNNI adds two products of INT8 codes in 16 bits and saturates: 8-bit weights then give garbage, silently
# (YOLOv8n on BCCD: 0.613 -> 0.049). 255 * 63 * 2 fits. NNCF's `overflow_fix` and ONNX Runtime's `reduce_range` are the same remedy.
WEIGHT_BITS = 7
AMAX_FLOOR = 1e-6  # above 2**-24, at and below which ModelOpt takes a range for zero and every code of it becomes 0


@dataclass(frozen=True)
class QuantState:
    """Ranges by module name, in the order in which the network defines them.

    Attributes:
        activations: Tensor, as `placement` names it -> amax; equal where tensors share a scale.
        weights: Convolution -> amax_C of its weight (one an output channel).
        outputs: Convolution -> amax of its output before the activation (after BatchNorm), for runtimes that fuse nothing
            without it.
        folded: Whether BatchNorm has been folded into the weights that `weights` speaks of.
        method: How the activation ranges were found, for the record.
        weight_bits: Of the INT8 weights, 8 or 7 (codes -63 to 63).
    """

    activations: Mapping[str, float]
    weights: Mapping[str, tuple[float, ...]]
    outputs: Mapping[str, float] = field(default_factory=dict)
    folded: bool = False
    method: str = ""
    weight_bits: int = WEIGHT_BITS

    def __post_init__(self) -> None:
        scalars = [*self.activations.items(), *self.outputs.items()]
        values = [*scalars, *((name, amax) for name, amax_C in self.weights.items() for amax in amax_C)]
        for name, amax in values:
            if not (math.isfinite(amax) and amax > 0):
                raise NumericsError(f"quantiser state: range of {name} is {amax}, expected a finite number above 0")
        if self.weight_bits not in (7, 8):
            raise CorruptArtifact(f"quantiser state: weights of {self.weight_bits} bits, expected 7 or 8")

    @property
    def weight_qmax(self) -> int:
        """Largest code of a weight."""
        return int(2 ** (self.weight_bits - 1)) - 1

    @property
    def convs(self) -> tuple[str, ...]:
        """Names of the quantised convolutions."""
        return tuple(self.weights)

    def without(self, groups: Iterable[Group]) -> QuantState:
        """The state with groups of the plan left in float, and with them the convolutions that read them."""
        groups = list(groups)
        tensors = {tensor for group in groups for tensor in group.tensors}
        convs = {conv for group in groups for conv in group.convs}
        return replace(
            self,
            activations={name: amax for name, amax in self.activations.items() if name not in tensors},
            weights={name: amax_C for name, amax_C in self.weights.items() if name not in convs},
            outputs={name: amax for name, amax in self.outputs.items() if name not in convs},
        )

    def to_json(self) -> dict[str, Any]:
        """The state as JSON types; floats survive the round trip exactly."""
        return {
            "version": VERSION,
            "folded": self.folded,
            "method": self.method,
            "weight_bits": self.weight_bits,
            "activations": dict(self.activations),
            "weights": {name: list(amax_C) for name, amax_C in self.weights.items()},
            "outputs": dict(self.outputs),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> QuantState:
        """Inverse of `to_json`.

        Raises:
            CorruptArtifact: Keys are missing, of the wrong type, or of another version.
        """
        if data.get("version") != VERSION:
            raise CorruptArtifact(f"quantiser state: version {data.get('version')}, expected {VERSION}; run qat again")
        try:
            return cls(
                activations={str(name): float(amax) for name, amax in data["activations"].items()},
                weights={str(name): tuple(map(float, amax_C)) for name, amax_C in data["weights"].items()},
                outputs={str(name): float(amax) for name, amax in data["outputs"].items()},
                folded=bool(data["folded"]),
                method=str(data["method"]),
                weight_bits=int(data["weight_bits"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptArtifact(f"quantiser state: not readable ({type(error).__name__}: {error})") from error

    def dumps(self) -> str:
        """The state as a JSON document: same state, same bytes."""
        return json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n"

    @classmethod
    def load(cls, path: Path) -> QuantState:
        """Read what `dumps` gave.

        Raises:
            CorruptArtifact: Not JSON, or not a quantiser state.
            StorageError: It cannot be read.
        """
        return cls.from_json(strict_json.load(path, CorruptArtifact, "; run qat again"))


def fold(state: QuantState, model: nn.Module) -> QuantState:
    """The state for the network whose BatchNorms are folded into its convolutions.

    The folded weight of output channel c is `w_c * gamma_c / sqrt(var_c + eps)`, so its range scales by the absolute value
    of that factor and no INT8 code moves but for its sign (the code range of weights is symmetric, -127 to 127). A channel
    whose factor is 0 has weight 0 in any code; its range becomes `AMAX_FLOOR`, since a scale may not be 0.

    Args:
        state: Ranges of `model` as it is.
        model: The network before folding, in the convolution-BatchNorm blocks of Ultralytics (`x.conv`, `x.bn`).

    Raises:
        CorruptArtifact: `state` is folded already, or speaks of another network.
    """
    if state.folded:
        raise CorruptArtifact("quantiser state: BatchNorm is folded into it already")
    modules = dict(model.named_modules())
    weights = {}
    for name, amax_C in state.weights.items():
        bn = norm_after(modules, name)
        amax = torch.tensor(amax_C, dtype=torch.float32)
        conv = modules.get(name)
        if not isinstance(conv, nn.Conv2d) or conv.out_channels != len(amax_C):
            got = "nothing" if conv is None else str(conv)
            raise CorruptArtifact(f"quantiser state: {name} has {len(amax_C)} output channels, the network has {got}")
        if isinstance(bn, nn.BatchNorm2d):
            assert bn.running_var is not None
            factor_C = (bn.weight / torch.sqrt(bn.running_var + bn.eps)).abs().detach().float().cpu()
            amax = amax * factor_C
        weights[name] = tuple(amax.clamp_min(AMAX_FLOOR).tolist())
    return replace(state, weights=weights, folded=True)
