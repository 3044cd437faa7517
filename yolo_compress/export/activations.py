"""Check, before anything trains, that the files of each runtime can hold the activations of a model.

Of its layers, only the activations differ between models of one family: an architecture file can name any of torch's.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path

import onnx
import torch
from torch import nn

from yolo_compress.errors import RecipeError
from yolo_compress.export.float_onnx import quiet_trace
from yolo_compress.export.qdq import ELEMENTWISE, activation_output
from yolo_compress.runtime import registry


def check_int8(model: nn.Module, opset: int) -> None:
    """Check that INT8 files support all activations of a model. It is not changed.

    Raises:
        RecipeError: An activation does not consist of nodes in `qdq.ELEMENTWISE`, or the opset does not support it.
    """
    _each(model, opset, _check_int8)


def check_converted(model: nn.Module, opset: int, runtime: str, remedy: str) -> None:
    """Check that the converter of a runtime writes all activations of a model. It is not changed.

    Args:
        remedy: How to leave this runtime out, for the error message.

    Raises:
        RecipeError: The converter refuses an activation, or the opset does not support it.
    """

    def check(act: str, traced: onnx.ModelProto) -> None:
        faults = [fault for _, fault in registry.refusals(runtime, traced, Path(act))]
        if faults:
            title = registry.RUNTIMES[runtime].title
            raise RecipeError(
                f"activation {act}: {faults[0]}, which this package does not convert to {title}; {remedy}"
            )

    _each(model, opset, check)


def _check_int8(act: str, traced: onnx.ModelProto) -> None:
    conv = next(node for node in traced.graph.node if node.op_type == "Conv")
    if unsupported := {node.op_type for node in traced.graph.node} - ELEMENTWISE - {"Conv", "Constant", "Identity"}:
        raise RecipeError(
            f"activation {act}: INT8 files do not support it (ONNX {', '.join(sorted(unsupported))}); leave out the section qat "
            "and set export.precisions=fp32,fp16"
        )
    activation_output(traced.graph, conv)


def _each(model: nn.Module, opset: int, check: Callable[[str, onnx.ModelProto], None]) -> None:
    """Call `check` with the name of each activation of a model, and with a convolution before it as an ONNX model.

    Raises:
        RecipeError: The opset does not support an activation.
    """
    acts = {repr(act): act for module in model.modules() if isinstance(act := getattr(module, "act", None), nn.Module)}
    for act in acts.values():
        check(type(act).__name__, _traced(copy.deepcopy(act), opset))


def _traced(act: nn.Module, opset: int) -> onnx.ModelProto:
    file = io.BytesIO()
    with torch.no_grad(), quiet_trace():
        net = nn.Sequential(nn.Conv2d(1, 1, 1), act).eval()
        try:
            torch.onnx.export(net, (torch.zeros(1, 1, 2, 2),), file, opset_version=opset, dynamo=False)
        except Exception as error:  # torch's exporter raises whatever its symbolic functions do
            reason = str(error).splitlines()[0]
            raise RecipeError(
                f"activation {type(act).__name__}: ONNX opset {opset} does not support it: {reason}"
            ) from error
    return onnx.load_from_string(file.getvalue())
