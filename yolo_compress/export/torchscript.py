"""INT8 as TorchScript, for torch on a CPU: its quantised convolutions, with the scales of the other INT8 files.

The same tensors are codes as in the Q/DQ forms, from where they are made to their readers: UINT8 with zero point 128, since
`quantized::conv2d` takes no signed ones. Weights INT8 an output channel, the codes of the other forms: in 7 bits, since with 8
fbgemm and oneDNN saturate without VNNI, too. A convolution gives codes of the range `state.outputs`; the activation between
those and the codes of its tensor is computed in float. On codes (`quantized::sigmoid`, `quantized::mul`) it takes as long, and
QNNPACK's has no scale but 1/256.

Packed parameters are one engine's, but only in memory: the file holds weights and biases, and `torch.jit.load` packs them for the
engine of its process. A file loads and runs under each of fbgemm, x86, onednn and qnnpack, whichever wrote it, and runs on if the
engine is changed after it was loaded (torch 2.14.1). What is written differs in layout from engine to engine, and "x86" is
another on a processor with VNNI, so files are written with the first of `ENGINES`.

torch means to remove its quantised tensors (pytorch/pytorch#184982); a file then needs a torch that still has them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from yolo_compress.errors import CompressError, CorruptArtifact, EnvironmentLacks
from yolo_compress.export.float_onnx import prepare, quiet_trace, save_torchscript
from yolo_compress.quant.plan import IMAGES, Plan, plan
from yolo_compress.quant.ranges import QMAX, QuantState

ZERO_POINT = 128
ENGINES = ("fbgemm", "onednn", "qnnpack")
# QNNPACK holds a bias as INT32 in steps of input scale times weight scale and overflows silently where a channel's weights are
# near 0 (a dead channel). There the scale of the weights is raised until the bias fits, half of INT32 left for the sum.
MAX_BIAS_STEPS = 2.0**30


class Codes(nn.Module):
    """Float to codes."""

    def __init__(self, amax: float) -> None:
        super().__init__()
        self.scale = amax / QMAX

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return torch.quantize_per_tensor(x_BCHW, self.scale, ZERO_POINT, torch.quint8)


class Values(nn.Module):
    """Codes to float."""

    def forward(self, codes_BCHW: Tensor) -> Tensor:
        return codes_BCHW.dequantize()


class CodedConv(nn.Module):
    """A convolution from codes to codes.

    Args:
        conv: With BatchNorm folded in.
        amax_C: Of its weight.
        read: amax of what it reads.
        made: amax of its output.
        qmax: Largest code of a weight.
    """

    def __init__(self, conv: nn.Conv2d, amax_C: tuple[float, ...], read: float, made: float, qmax: int) -> None:
        super().__init__()
        self.scale = made / QMAX
        bias_C = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
        least_C = bias_C.double().abs() / (read / QMAX * MAX_BIAS_STEPS)
        scale_C = (torch.tensor(amax_C, dtype=torch.float64) / qmax).maximum(least_C)
        limit_C111 = (scale_C * qmax).float().view(-1, 1, 1, 1)  # training may leave weights beyond their range
        weight = conv.weight.detach().clamp(-limit_C111, limit_C111)
        codes = torch.quantize_per_channel(weight, scale_C, torch.zeros(len(scale_C), dtype=torch.long), 0, torch.qint8)
        shape = list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups
        self.packed: Any = torch.ops.quantized.conv2d_prepack(codes, bias_C, *shape)

    def forward(self, codes_BCHW: Tensor) -> Tensor:
        made_BCHW: Tensor = torch.ops.quantized.conv2d(codes_BCHW, self.packed, self.scale, ZERO_POINT)
        return made_BCHW


class CodedSum(nn.Module):
    """A block with shortcut from codes to codes; its children `branch`, one after the other, are the branch."""

    def __init__(self, block: nn.Module, branch: Sequence[str], amax: float) -> None:
        super().__init__()
        self.branch, self.scale = tuple(branch), amax / QMAX
        for name in branch:
            self.add_module(name, block.get_submodule(name))

    def forward(self, codes_BCHW: Tensor) -> Tensor:
        branch_BCHW = codes_BCHW
        for name in self.branch:
            branch_BCHW = self.get_submodule(name)(branch_BCHW)
        sum_BCHW: Tensor = torch.ops.quantized.add(codes_BCHW, branch_BCHW, self.scale, ZERO_POINT)
        return sum_BCHW


def export_int8_torchscript(
    model: nn.Module, out: Path, imgsz_hw: tuple[int, int], state: QuantState, *, names: Sequence[str], batch: int = 1
) -> None:
    """Write the INT8 TorchScript file, with the `config.txt` that `ultralytics.YOLO("x.torchscript")` reads.

    Input and output are those of `export_torchscript`, float32; nothing but torch is needed to run it, on a CPU.

    Args:
        model: The stock detector that `state` speaks of. Not changed: a copy is fused, converted and traced.
        out: File to write.
        imgsz_hw: Height and width in pixels, multiples of the model's largest stride.
        state: Ranges with BatchNorm folded (`state.fold`).
        names: Class names, in the order of the class scores.
        batch: Images of one call.

    Raises:
        EnvironmentLacks: This torch has no quantised convolutions.
        CorruptArtifact: Model and state do not belong together, or the state has no ranges of the convolutions' outputs.
        CompressError: What was traced is not as planned.
        RecipeError, NumericsError: As `export_onnx`.
    """
    net, images, metadata = prepare(model, imgsz_hw, names, batch, "torchscript")
    with torch.no_grad(), _engine(), quiet_trace(), _quiet_codes():
        to_codes(net, state)
        traced = torch.jit.trace(net, images, strict=False, check_trace=False)
        made = [node.kind() for node in traced.inlined_graph.nodes()].count("quantized::conv2d")
        if made != len(state.convs):
            raise CompressError(f"{out}: {made} convolutions compute in INT8, planned {len(state.convs)}")
        save_torchscript(traced, out, {**metadata, "precision": "int8"})


def to_codes(net: nn.Module, state: QuantState) -> None:
    """Make a fused detector compute on codes what `state` plans, in place; what it does not plan stays float.

    Raises:
        CorruptArtifact: As `export_int8_torchscript`.
    """
    placed = plan(net)
    _check(net, placed, state)
    for name, tensor in placed.reads.items():
        made = name.removesuffix(".conv")
        block: Any = net.get_submodule(made)
        before: list[nn.Module] = [Values()] if name in state.weights else []
        after: list[nn.Module] = [Codes(state.activations[made])] if made in state.activations else []
        if name in state.weights:
            read = state.activations[tensor]
            conv = CodedConv(block.conv, state.weights[name], read, state.outputs[name], state.weight_qmax)
            block.conv = nn.Sequential(Codes(read), conv) if tensor == IMAGES else conv
        if before or after:
            block.act = nn.Sequential(*before, block.act, *after)
    for name in state.activations:
        if name in placed.sums:
            parent, _, child = name.rpartition(".")
            coded = CodedSum(net.get_submodule(name), placed.sums[name], state.activations[name])
            setattr(net.get_submodule(parent), child, coded)


def _check(net: nn.Module, placed: Plan, state: QuantState) -> None:
    """The state is of this network, whole groups of it, and says what each convolution gives."""
    if not state.folded:
        raise CorruptArtifact("quantiser state: BatchNorm is not folded into it; call fold() with the trained model")
    tensors = {tensor for group in placed.groups for tensor in group.tensors}
    if unknown := [*(set(state.activations) - tensors), *(set(state.weights) - set(placed.reads))]:
        raise CorruptArtifact(f"quantiser state: the network has no {', '.join(sorted(unknown))}")
    for name, amax_C in state.weights.items():
        conv: Any = net.get_submodule(name)
        if conv.out_channels != len(amax_C):
            raise CorruptArtifact(
                f"{name}: {conv.out_channels} output channels in the network, {len(amax_C)} in the state"
            )
    for group in placed.groups:
        if len({state.activations.get(tensor) for tensor in group.tensors}) > 1:
            raise CorruptArtifact(f"quantiser state: {', '.join(group.tensors)} have to share a scale")
    for name, tensor in placed.reads.items():
        if (name in state.weights) != (tensor in state.activations):
            has, lacks = ("codes", "no weight range") if tensor in state.activations else ("float", "a weight range")
            raise CorruptArtifact(f"quantiser state: {name} reads {has} ({tensor}) and has {lacks}")
    if missing := [name for name in state.weights if name not in state.outputs]:
        raise CorruptArtifact(
            f"quantiser state: no range of the output of {len(missing)} convolutions ({', '.join(missing[:3])}, ...), which "
            "torch's INT8 convolution gives as codes; run qat again, or set export.torchscript=false"
        )


def find_engine() -> str:
    """The first of `ENGINES` that this torch has.

    Raises:
        EnvironmentLacks: It has none, or no quantised convolutions any more.
    """
    quantized = torch.backends.quantized
    found = [engine for engine in ENGINES if engine in quantized.supported_engines]
    if not found or not hasattr(torch.ops.quantized, "conv2d_prepack"):
        raise EnvironmentLacks(
            f"INT8 TorchScript: torch {torch.__version__} has none of the engines {', '.join(ENGINES)} of quantised convolutions "
            f"(it has {', '.join(quantized.supported_engines)}); install another build, or set export.torchscript=false"
        )
    return found[0]


@contextmanager
def _engine() -> Iterator[None]:
    """Pack with the engine that `find_engine` gives."""
    quantized, chosen = torch.backends.quantized, find_engine()
    before = quantized.engine
    quantized.engine = chosen
    try:
        yield
    finally:
        quantized.engine = before


@contextmanager
def _quiet_codes() -> Iterator[None]:
    """That quantised tensors are deprecated is said in this file, not at each export."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"torch\.quantize_per_tensor.* deprecated", UserWarning)
        yield
