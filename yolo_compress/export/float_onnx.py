"""Export a detector in FP32 to ONNX and TorchScript, with the inputs and outputs of Ultralytics' own export.

Input `images` is `[B, C, H, W]` float32 from 0 to 1, RGB or grey (C = 1). Output `output0` is `[B, 4 + nc, A]` float32: boxes as
centre x, centre y, width, height in pixels of the input, then nc class scores from 0 to 1, for each of A anchors. Isaac ROS
and Ultralytics decode it. The output of an end-to-end head has the same form: it comes from the one-to-one branches, and the metadata
`needs_nms` is False.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from yolo_compress import progress
from yolo_compress.errors import CompressError, NumericsError, RecipeError
from yolo_compress.files.atomic import atomic_write, storage_errors
from yolo_compress.nets import detect
from yolo_compress.nets.families import family_of
from yolo_compress.runtime.backends.onnx_metadata import NEEDS_NMS

OPSET = 17  # of files for which nobody asks for another
MIN_OPSET = 13  # the first opset in which DequantizeLinear can have one scale per output channel
MAX_IR_VERSION = 10  # the latest that ONNX Runtime 1.19 to 1.32 and TensorRT 8.5 to 11 all read


def export_onnx(
    model: nn.Module,
    out: Path,
    imgsz_hw: tuple[int, int],
    *,
    names: Sequence[str],
    opset: int = OPSET,
    batch: int = 1,
    dynamic_batch: bool = False,
    simplify: bool = True,
) -> None:
    """Write the FP32 ONNX file of a stock detector, pruned or not. Equal models give equal bytes.

    The weight of every convolution is named after its module (`model.0.conv.weight`). `export.qdq` finds convolutions by
    this name.

    Args:
        model: A stock Ultralytics `DetectionModel`. It is not changed: a copy is fused and traced.
        out: File to write.
        imgsz_hw: Height and width in pixels, multiples of the model's largest stride.
        names: Class names in the order of the class scores.
        opset: ONNX operator set.
        batch: Number of images per call. If `dynamic_batch` is True, this is only the value in the metadata.
        dynamic_batch: Make the first dimension of input and output dynamic.
        simplify: Simplify the graph with onnxsim.

    Raises:
        RecipeError: The size or opset is not supported.
        NumericsError: A weight is NaN or infinite.
        CompressError: onnxsim or the checker refuses the graph.
        StorageError: The file cannot be written.
    """
    if opset < MIN_OPSET:
        raise RecipeError(f"export.opset={opset}: expected {MIN_OPSET} or more (for scales per output channel)")
    net, images, metadata = prepare(model, imgsz_hw, names, batch, "onnx")
    with torch.no_grad(), quiet_trace(), storage_errors(out):
        shape = net(images).shape
        torch.onnx.export(
            net,
            (images,),
            str(out),
            opset_version=opset,
            input_names=["images"],
            output_names=["output0"],
            dynamic_axes={"images": {0: "batch"}, "output0": {0: "batch"}} if dynamic_batch else None,
            dynamo=False,  # torch 2.14's new exporter renames weights when it optimises; Ultralytics uses the old one, too
        )
    graph = onnx.load(str(out))
    if simplify:
        graph = _simplify(graph, out)
    for dim, size in zip(graph.graph.output[0].type.tensor_type.shape.dim[1:], shape[1:], strict=True):
        dim.dim_value = size  # with a dynamic batch the tracer makes the number of classes dynamic, too
    graph.ir_version = min(graph.ir_version, MAX_IR_VERSION)
    write_metadata(graph, {**metadata, "precision": "fp32"})
    try:
        onnx.checker.check_model(graph, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise CompressError(f"{out}: the exported graph does not pass onnx.checker: {error}") from error
    with storage_errors(out):
        onnx.save(graph, str(out))


def export_torchscript(
    model: nn.Module, out: Path, imgsz_hw: tuple[int, int], *, names: Sequence[str], batch: int = 1
) -> None:
    """Write the FP32 TorchScript file of a stock detector. It contains the `config.txt` that `ultralytics.YOLO` reads.

    For the arguments see `export_onnx`.

    Raises:
        RecipeError: The size is not supported.
        NumericsError: A weight is NaN or infinite.
        StorageError: The file cannot be written.
    """
    net, images, metadata = prepare(model, imgsz_hw, names, batch, "torchscript")
    with torch.no_grad(), quiet_trace():
        traced = torch.jit.trace(net, images, strict=False, check_trace=False)
    save_torchscript(traced, out, metadata)


def save_torchscript(traced: torch.jit.ScriptModule, out: Path, metadata: Mapping[str, object]) -> None:
    """Write a traced module to a TorchScript file, with `metadata` as its `config.txt`.

    The file is first written to memory. torch 2.14's own writer ends the process if the disk is full (exception in a destructor).

    Raises:
        StorageError: The file cannot be written.
    """
    atomic_write(out, traced.save_to_buffer(_extra_files={"config.txt": json.dumps(metadata)}))


def write_metadata(graph: onnx.ModelProto, metadata: Mapping[str, object]) -> None:
    """Set metadata of an ONNX model, in place. Existing values of the same keys are replaced."""
    merged = {item.key: item.value for item in graph.metadata_props}
    merged.update({key: str(value) for key, value in metadata.items()})
    onnx.helper.set_model_props(graph, merged)


def prepare(
    model: nn.Module, imgsz_hw: tuple[int, int], names: Sequence[str], batch: int, kind: str
) -> tuple[nn.Module, torch.Tensor, dict[str, object]]:
    """Return (fused copy of the model in export mode, example input of zeros, metadata as in Ultralytics' export).

    Args:
        kind: Ultralytics' name of the file format: "onnx" or "torchscript".
    """
    net: Any = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    family = family_of(net, "export")
    classes, stride = net.model[-1].nc, int(max(net.stride))
    height, width = imgsz_hw
    if height <= 0 or width <= 0 or height % stride or width % stride:
        raise RecipeError(f"export size {height}x{width} (height x width): expected multiples of the stride {stride}")
    if len(names) != classes:
        raise RecipeError(f"export: {len(names)} class names, but the head has {classes} classes")
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NumericsError(f"export: {name} contains NaN or infinity; train again")
    detect.fuse(net)
    detect.for_export(net, kind)
    family.for_export(net)
    channels = int(net.yaml.get("channels", 3))
    images = torch.zeros(batch, channels, height, width)
    with torch.no_grad():
        shape = tuple(net(images).shape)  # also creates the anchors, which must be constants of the trace
    anchors = sum((height // int(s)) * (width // int(s)) for s in net.stride)
    if shape != (batch, 4 + classes, anchors):
        raise CompressError(f"export: the model returns {shape}, expected {(batch, 4 + classes, anchors)}")
    metadata = {
        "description": "YOLO detector, exported by yolo_compress",
        "author": "Ultralytics",
        "license": "AGPL-3.0 License (https://ultralytics.com/license)",
        "docs": "https://docs.ultralytics.com",
        "stride": stride,
        "task": "detect",
        "head": detect.NAME,
        "batch": batch,
        "imgsz": [height, width],
        "names": dict(enumerate(names)),
        "args": {"batch": batch, "dynamic": False, "nms": False},  # `dynamic` means height and width, which are fixed
        "channels": channels,
        "end2end": False,  # in Ultralytics: whether the output is the best rows
    }
    if not detect.needs_nms(net):
        metadata[NEEDS_NMS] = False
    return net, images, metadata


def _simplify(graph: onnx.ModelProto, out: Path) -> onnx.ModelProto:
    import onnxsim

    try:
        simplified, same = onnxsim.simplify(graph)
    except Exception as error:  # onnxsim raises whatever its C++ part does
        raise CompressError(
            f"{out}: onnxsim {onnxsim.__version__} failed: {error}; set export.simplify=false"
        ) from error
    if not same:
        raise CompressError(f"{out}: onnxsim {onnxsim.__version__} changed the outputs; set export.simplify=false")
    # onnxsim can make a factor of the activation (as in GELU) part of the next weight
    if rewritten := _weight_names(graph) - _weight_names(simplified):
        progress.say(
            f"export: {out.name} is not simplified: onnxsim rewrites {len(rewritten)} weights, such as {min(rewritten)}"
        )
        return graph
    return simplified


def _weight_names(graph: onnx.ModelProto) -> set[str]:
    return {node.input[1] for node in graph.graph.node if node.op_type == "Conv"}


@contextmanager
def quiet_trace() -> Iterator[None]:
    """Hide two warnings of tracing: a branch on a fixed shape becomes constant (as intended), and torch's exporter is deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield
