"""Export an INT8 TorchScript file for torch on a CPU: torch's quantised convolutions with the scales of the other INT8 files.

The same tensors as in the Q/DQ forms are INT8, as UINT8 with zero point 128, since `quantized::conv2d` accepts no signed
activations. Weights are the INT8 values of the other forms, per output channel. They have 7 bits, since with 8 bits fbgemm and
oneDNN saturate on processors without VNNI.

The output of a convolution is INT8 with the range in `state.outputs`, or before SiLU with that of `quant.ranges.before_silu`. The
activation after the convolution runs in float. INT8 activations (`quantized::sigmoid`, `quantized::mul`) take as long, and QNNPACK
supports only the scale 1/256.

The file contains weights and biases, and `torch.jit.load` packs them for the engine of its process. A file runs on fbgemm, x86,
onednn and qnnpack, whichever engine wrote it, and also if the engine changes after loading (torch 2.14.1). The layout of the file
depends on the engine, and "x86" depends on VNNI. Files are therefore written with the first available engine of `ENGINES`.

torch plans to remove quantised tensors (pytorch/pytorch#184982). A file then needs an older torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from yolo_compress.errors import CompressError, CorruptArtifact, EnvironmentLacks
from yolo_compress.export.float_onnx import prepare, quiet_trace, save_torchscript
from yolo_compress.nets.flow import WHOLE_LAYER
from yolo_compress.quant.plan import IMAGES, Plan, plan
from yolo_compress.quant.ranges import QMAX, QuantState, before_silu

ZERO_POINT = 128
ENGINES = ("fbgemm", "onednn", "qnnpack")
# QNNPACK stores a bias as INT32 in units of input scale times weight scale. If the weights of a channel are near 0 (a dead
# channel), it overflows silently. The scale of such weights is therefore raised until the bias fits in half of INT32; the other
# half is for the sum.
MAX_BIAS_STEPS = 2.0**30


class Quantise(nn.Module):
    """Convert float to UINT8 with zero point 128."""

    def __init__(self, amax: float) -> None:
        super().__init__()
        self.scale = amax / QMAX

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return torch.quantize_per_tensor(x_BCHW, self.scale, ZERO_POINT, torch.quint8)


class Dequantise(nn.Module):
    """Convert a quantised tensor to float."""

    def forward(self, int8_BCHW: Tensor) -> Tensor:
        return int8_BCHW.dequantize()


class Int8Conv(nn.Module):
    """A convolution with INT8 input, weight and output.

    Args:
        conv: Float convolution with BatchNorm folded in.
        amax_C: Range (largest absolute value) of the weight, per output channel.
        in_amax: Range of the input.
        out_scale, out_zero_point: Scale and zero point of the output.
        qmax: Largest INT8 value of a weight.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        amax_C: tuple[float, ...],
        in_amax: float,
        out_scale: float,
        out_zero_point: int,
        qmax: int,
    ) -> None:
        super().__init__()
        self.scale, self.zero_point = out_scale, out_zero_point
        bias_C = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
        min_scale_C = bias_C.double().abs() / (in_amax / QMAX * MAX_BIAS_STEPS)
        scale_C = (torch.tensor(amax_C, dtype=torch.float64) / qmax).maximum(min_scale_C)
        limit_C111 = (scale_C * qmax).float().view(-1, 1, 1, 1)  # trained weights can exceed their range
        weight = conv.weight.detach().clamp(-limit_C111, limit_C111)
        codes = torch.quantize_per_channel(weight, scale_C, torch.zeros(len(scale_C), dtype=torch.long), 0, torch.qint8)
        shape = list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups
        self.packed: Any = torch.ops.quantized.conv2d_prepack(codes, bias_C, *shape)

    def forward(self, int8_BCHW: Tensor) -> Tensor:
        output_BCHW: Tensor = torch.ops.quantized.conv2d(int8_BCHW, self.packed, self.scale, self.zero_point)
        return output_BCHW


class Int8Sum(nn.Module):
    """A block with shortcuts and INT8 input and output. The children named in a branch run one after the other."""

    def __init__(self, block: nn.Module, branches: Sequence[Sequence[str]], amax: float) -> None:
        super().__init__()
        self.branches, self.scale = branches, amax / QMAX
        for name in chain(*branches):
            self.add_module(name, block.get_submodule(name))

    def forward(self, int8_BCHW: Tensor) -> Tensor:
        for branch in self.branches:
            branch_BCHW = int8_BCHW
            for name in branch:
                branch_BCHW = self.get_submodule(name)(branch_BCHW)
            int8_BCHW = torch.ops.quantized.add(int8_BCHW, branch_BCHW, self.scale, ZERO_POINT)
        return int8_BCHW


def _int8_layer(layer: Any, scale: float, int8_BCHW: Tensor) -> Tensor:
    """Replacement for `forward` of a layer with a shortcut and INT8 input and output. Its attribute `add` is False."""
    last_BCHW = type(layer).forward(layer, int8_BCHW)
    return torch.ops.quantized.add(last_BCHW, int8_BCHW, scale, ZERO_POINT)  # type: ignore[no-any-return]


def export_int8_torchscript(
    model: nn.Module, out: Path, imgsz_hw: tuple[int, int], state: QuantState, *, names: Sequence[str], batch: int = 1
) -> None:
    """Write the INT8 TorchScript file, with the `config.txt` that `ultralytics.YOLO("x.torchscript")` reads.

    Input and output are float32, as in `export_torchscript`. The file runs on a CPU and needs only torch.

    Args:
        model: The stock detector that belongs to `state`. It is not changed: a copy is fused, converted and traced.
        out: File to write.
        imgsz_hw: Height and width in pixels, multiples of the model's largest stride.
        state: Ranges with BatchNorm folded (`quant.ranges.fold`).
        names: Class names in the order of the class scores.
        batch: Number of images per call.

    Raises:
        EnvironmentLacks: This torch has no quantised convolutions.
        CorruptArtifact: Model and state do not belong together, or the state has no ranges of the convolutions' outputs.
        CompressError: The traced model differs from the plan.
        RecipeError: The size is not supported.
        NumericsError: A weight is NaN or infinite.
    """
    net, images, metadata = prepare(model, imgsz_hw, names, batch, "torchscript")
    with torch.no_grad(), _engine(), quiet_trace(), _quiet_deprecation():
        convert_to_int8(net, state)
        traced = torch.jit.trace(net, images, strict=False, check_trace=False)
        int8_convs = [node.kind() for node in traced.inlined_graph.nodes()].count("quantized::conv2d")
        if int8_convs != len(state.convs):
            raise CompressError(
                f"{out}: {int8_convs} convolutions are INT8, expected {len(state.convs)}; report this as a bug"
            )
        save_torchscript(traced, out, {**metadata, "precision": "int8"})


def convert_to_int8(net: nn.Module, state: QuantState) -> None:
    """Convert the layers of a fused detector that have ranges in `state` to INT8, in place. Other layers stay float.

    Raises:
        CorruptArtifact: Model and state do not belong together, or the state has no ranges of the convolutions' outputs.
    """
    placed = plan(net)
    _check(net, placed, state)
    for name, tensor in placed.reads.items():
        block_name = name.removesuffix(".conv")
        block: Any = net.get_submodule(block_name)
        before: list[nn.Module] = [Dequantise()] if name in state.weights else []
        after: list[nn.Module] = [Quantise(state.activations[block_name])] if block_name in state.activations else []
        if name in state.weights:
            read = state.activations[tensor]
            made = state.outputs[name] / QMAX, ZERO_POINT
            if block_name in state.activations and isinstance(block.act, nn.SiLU):
                made = before_silu(state.outputs[name], state.activations[block_name])
            conv = Int8Conv(block.conv, state.weights[name], read, *made, state.weight_qmax)
            block.conv = nn.Sequential(Quantise(read), conv) if tensor == IMAGES else conv
        if before or after:
            block.act = nn.Sequential(*before, block.act, *after)
    for name in state.activations:
        if placed.sums.get(name) == WHOLE_LAYER:
            layer: Any = net.get_submodule(name)
            layer.add, layer.forward = False, partial(_int8_layer, layer, state.activations[name] / QMAX)
        elif name in placed.sums:
            parent, _, child = name.rpartition(".")
            int8_sum = Int8Sum(net.get_submodule(name), placed.sums[name], state.activations[name])
            setattr(net.get_submodule(parent), child, int8_sum)


def _check(net: nn.Module, placed: Plan, state: QuantState) -> None:
    """Check that the state belongs to this model, has whole groups of its plan, and has the output range of each convolution."""
    if not state.folded:
        raise CorruptArtifact("quantiser state: BatchNorm is not folded into it; call fold() with the trained model")
    tensors = {tensor for group in placed.groups for tensor in group.tensors}
    if unknown := [*(set(state.activations) - tensors), *(set(state.weights) - set(placed.reads))]:
        raise CorruptArtifact(f"quantiser state: the model has no {', '.join(sorted(unknown))}")
    for name, amax_C in state.weights.items():
        conv: Any = net.get_submodule(name)
        if conv.out_channels != len(amax_C):
            raise CorruptArtifact(
                f"{name}: {conv.out_channels} output channels in the model, {len(amax_C)} in the state"
            )
    for group in placed.groups:
        if len({state.activations.get(tensor) for tensor in group.tensors}) > 1:
            raise CorruptArtifact(f"quantiser state: {', '.join(group.tensors)} have to share a scale")
    for name, tensor in placed.reads.items():
        if (name in state.weights) != (tensor in state.activations):
            precision, weight = (
                ("INT8", "no weight range") if tensor in state.activations else ("float", "a weight range")
            )
            raise CorruptArtifact(f"quantiser state: {name} reads {precision} ({tensor}), but has {weight}")
    if missing := [name for name in state.weights if name not in state.outputs]:
        raise CorruptArtifact(
            f"quantiser state: no output range for {len(missing)} convolutions ({', '.join(missing[:3])}, ...), which torch's "
            "INT8 convolutions need; run qat again, or set export.torchscript=false"
        )


def find_engine() -> str:
    """Return the first of `ENGINES` that this torch supports.

    Raises:
        EnvironmentLacks: This torch supports none of them, or has no quantised convolutions.
    """
    quantized = torch.backends.quantized
    supported = [engine for engine in ENGINES if engine in quantized.supported_engines]
    if not supported or not hasattr(torch.ops.quantized, "conv2d_prepack"):
        raise EnvironmentLacks(
            f"INT8 TorchScript: torch {torch.__version__} has none of the engines {', '.join(ENGINES)} of quantised convolutions "
            f"(it has {', '.join(quantized.supported_engines)}); install another build, or set export.torchscript=false"
        )
    return supported[0]


@contextmanager
def _engine() -> Iterator[None]:
    """Set torch's quantised engine to `find_engine()` inside a `with` block."""
    quantized, chosen = torch.backends.quantized, find_engine()
    before = quantized.engine
    quantized.engine = chosen
    try:
        yield
    finally:
        quantized.engine = before


@contextmanager
def _quiet_deprecation() -> Iterator[None]:
    """Hide torch's warning that quantised tensors are deprecated. The docstring of this file explains the warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"torch\.quantize_per_tensor.* deprecated", UserWarning)
        yield
