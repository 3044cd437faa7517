"""Ranges of a quantised model as plain data, independent of any library. PTQ and QAT compute the ranges. Export reads them.

The range of a tensor, `amax`, is the largest absolute value that its INT8 values represent. INT8 values are
`round(x * qmax / amax)`, symmetric with zero point 0, so `scale = amax / qmax`. `qmax` is 127 for activations and
`QuantState.weight_qmax` for weights. Only `before_silu` is not symmetric. The INT8 files of all runtimes contain the same values.
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
# x86 without VNNI adds two products of INT8 values in 16 bits and saturates. With 8-bit weights the results are then wrong
# without any error: mAP50-95 of YOLOv8n on BCCD fell from 0.613 to 0.049. 255 * 63 * 2 fits into 16 bits, so 7-bit weights are
# safe. NNCF's `overflow_fix` and ONNX Runtime's `reduce_range` do the same.
WEIGHT_BITS = 7
AMAX_FLOOR = 1e-6  # smallest range: ModelOpt treats ranges up to 2**-24 as zero and then quantises every value to 0
SILU_FLAT = 6.0  # SiLU(-6) = -0.015
SILU_STEPS = 50


@dataclass(frozen=True)
class QuantState:
    """Ranges (amax) of all INT8 tensors and weights of a model, in the order of the model.

    Attributes:
        activations: Tensor (named as in `nets.flow`) -> amax. Tensors that share a scale have equal values.
        weights: Convolution -> amax of its weight, one value per output channel.
        outputs: Convolution -> amax of its output after BatchNorm and before the activation. Some runtimes need this range to
            fuse layers.
        folded: Whether the ranges of the weights hold for convolutions into which BatchNorm was folded (see `fold`).
        method: Calibration method of the activations, for the report.
        weight_bits: Bits of the INT8 weights: 8, or 7 (values -63 to 63).
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
        """Largest INT8 value of a weight."""
        return int(2 ** (self.weight_bits - 1)) - 1

    @property
    def convs(self) -> tuple[str, ...]:
        """Names of the quantised convolutions."""
        return tuple(self.weights)

    def without(self, groups: Iterable[Group]) -> QuantState:
        """Return a copy of the state without the tensors in `groups`, and without the convolutions that read these tensors."""
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
        """Return the state as JSON types. `from_json` restores floats exactly."""
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
        """Return the state that `to_json` converted to `data`.

        Raises:
            CorruptArtifact: Keys are missing or of the wrong type, or the version is not supported.
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
            raise CorruptArtifact(
                f"quantiser state: cannot be read ({type(error).__name__}: {error}); run qat again"
            ) from error

    def dumps(self) -> str:
        """Return the state as the text of a JSON document. Equal states give equal text."""
        return json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n"

    @classmethod
    def load(cls, path: Path) -> QuantState:
        """Read the state from a file that contains the text of `dumps`.

        Raises:
            CorruptArtifact: The file is not JSON, or not a quantiser state.
            StorageError: The file cannot be read.
        """
        return cls.from_json(strict_json.load(path, CorruptArtifact, "; run qat again"))


def fold(state: QuantState, model: nn.Module) -> QuantState:
    """Return the ranges of a model after its BatchNorms are folded into its convolutions.

    The folded weight of output channel c is `w_c * gamma_c / sqrt(var_c + eps)`. The range of the weight is multiplied by the
    absolute value of the same factor. The INT8 values of weights therefore change at most their sign, since they are symmetric
    (-127 to 127). If the factor is 0, the range becomes `AMAX_FLOOR`, since a scale must not be 0.

    Args:
        state: Ranges of `model` before folding.
        model: The model before folding, with the convolution-BatchNorm blocks of Ultralytics (`x.conv`, `x.bn`).

    Raises:
        CorruptArtifact: `state` is already folded, or belongs to another model.
    """
    if state.folded:
        raise CorruptArtifact("quantiser state: BatchNorm is already folded in")
    modules = dict(model.named_modules())
    weights = {}
    for name, amax_C in state.weights.items():
        bn = norm_after(modules, name)
        amax = torch.tensor(amax_C, dtype=torch.float32)
        conv = modules.get(name)
        if not isinstance(conv, nn.Conv2d) or conv.out_channels != len(amax_C):
            got = "nothing" if conv is None else str(conv)
            raise CorruptArtifact(f"quantiser state: {name} has {len(amax_C)} output channels, the model has {got}")
        if isinstance(bn, nn.BatchNorm2d):
            assert bn.running_var is not None
            factor_C = (bn.weight / torch.sqrt(bn.running_var + bn.eps)).abs().detach().float().cpu()
            amax = amax * factor_C
        weights[name] = tuple(amax.clamp_min(AMAX_FLOOR).tolist())
    return replace(state, weights=weights, folded=True)


def before_silu(amax: float, output_amax: float) -> tuple[float, int]:
    """Return scale and zero point of UINT8 values for the input of a SiLU. They represent only what makes a difference in the output.

    Below `-SILU_FLAT` the output is nearly 0, and the quantiser of the output clips what is above `output_amax`. Some layers have
    inputs from -100 to 20. On NEU-DET (224 px, QAT), mAP50-95 on ONNX Runtime is 0.413 in place of 0.406.

    Args:
        amax: Largest absolute value of the input.
        output_amax: Largest absolute value that the quantiser of the output represents.
    """
    largest = output_amax
    for _ in range(SILU_STEPS):  # x * sigmoid(x) = output_amax, as x = output_amax * (1 + exp(-x))
        largest = output_amax * (1 + math.exp(-largest))
    low, high = min(amax, SILU_FLAT), min(amax, largest)
    scale = (low + high) / 255
    return scale, round(low / scale)
