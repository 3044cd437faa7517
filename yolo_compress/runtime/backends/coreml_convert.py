"""Convert an ONNX file to CoreML: an ML program with the same layers, number types and INT8 scales, written layer by layer.

coremltools writes the file on any system. Its own converter reads torch models, and takes no given scales, so it is not used.
"""

from __future__ import annotations

import io
import json
import logging
import uuid
from collections import Counter
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, Dict, Iterator, NamedTuple, Sequence, Tuple

import numpy as np

from ..errors import EngineError, RuntimeUnavailable
from . import onnx_graph
from .coreml_program import LAYERS, VISION, WEIGHT, named, program_of, require_supported, with_silu
from .onnx_graph import DEQUANTIZE, QUANTIZE, Graph, Weight

INSTALL = "pip install coremltools onnx"


class Census(NamedTuple):
    """What an ML program consists of.

    Attributes:
        layers: number of layers by type, constants left out.
        weights: convolution -> its INT8 weights.
        scales: quantised tensor -> its scale.
    """

    layers: Dict[str, int]
    weights: Dict[str, Weight]
    scales: Dict[str, float]


def library() -> Any:
    """Import and return coremltools, without its warnings that models cannot run on this system.

    Raises:
        RuntimeUnavailable: coremltools is missing.
    """
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import coremltools
    except ImportError as error:
        raise RuntimeUnavailable(f"coremltools does not import ({error})", INSTALL) from error
    finally:
        logger.setLevel(level)
    return coremltools


def require() -> None:
    """Check that an ONNX file can be converted here.

    Raises:
        RuntimeUnavailable: coremltools or onnx is missing.
    """
    library()
    onnx_graph.require(INSTALL)


def convert(file: Path, imgsz: Sequence[int], precision: str, vision: bool = False) -> Any:
    """Convert an ONNX file of `export` to a coremltools model that is not loaded. Its specification is `_spec`.

    Every layer keeps its number type: with fp16 and int8, the layers up to the output convolutions are float16 and the box decode is
    float32. With int8, quantised tensors have the scales of the file, and convolutions its INT8 weights.

    Args:
        imgsz: height and width of the input, px.
        precision: fp32, fp16 or int8.
        vision: whether the program takes pixels of an image and gives what CoreML's NMS reads (`RAW`), in place of `output0`.

    Raises:
        RuntimeUnavailable: coremltools or onnx is missing.
        EngineError: the file takes images of another size or has a layer that CoreML lacks. Or the precision is int8 and the file
            has no Q/DQ nodes, or an INT8 tensor with a zero point. Or coremltools wrote other layers, weights or scales.
    """
    coremltools = library()
    graph = with_silu(onnx_graph.read(file, imgsz, INSTALL))
    require_supported(graph, file, precision)
    with _quiet():
        model = coremltools.convert(
            program_of(coremltools, graph, vision),
            source="milinternal",
            convert_to="mlprogram",
            minimum_deployment_target=coremltools.target.iOS17,
            compute_precision=coremltools.precision.FLOAT32,  # leaves the number types as they are
            pass_pipeline=coremltools.PassPipeline.EMPTY,
            skip_model_load=True,
        )
        made = census(model.get_spec(), Path(model.weights_dir))
    lost = _differences(_expected(graph, vision), made)
    if lost:
        raise EngineError(f"{file}: coremltools {coremltools.__version__} wrote another model: {lost}; not used")
    return model


def census(spec: Any, weights: Path) -> Census:
    """Read the specification of an ML program, and return what it consists of.

    Args:
        weights: folder of its `weight.bin`.
    """
    library()
    from coremltools.converters.mil.frontend.milproto.load import load

    layers: Dict[str, int] = Counter()
    int8_weights, scales = {}, {}
    program = load(spec, spec.specificationVersion, str(weights))
    for layer in program.functions["main"].operations:
        if layer.op_type != "const":
            layers[layer.op_type] += 1
        if layer.op_type in ("quantize", "dequantize"):
            scales[layer.name] = float(layer.scale.val)
        if layer.op_type == "conv" and layer.weight.op.op_type == WEIGHT:
            stored = layer.weight.op
            int8_weights[layer.name] = Weight(stored.quantized_data.val, np.asarray(stored.scale.val, np.float32))
    return Census(dict(layers), int8_weights, scales)


def _expected(graph: Graph, vision: bool) -> Census:
    """Return what the ML program must consist of."""
    layers: Dict[str, int] = Counter(VISION if vision else {})
    int8_weights, scales, stored = {}, {}, {}
    for node in graph.nodes:
        if node.kind == DEQUANTIZE and node.inputs[0] in graph.constants:
            values, scale_O = (graph.constants[name] for name in node.inputs[:2])
            stored[node.outputs[0]] = Weight(values, scale_O.astype(np.float32))
            layers[WEIGHT] += 1
            continue
        layers[LAYERS[node.kind]] += 1
        if node.kind in (QUANTIZE, DEQUANTIZE):
            scales[named(node.outputs[0])] = float(graph.constants[node.inputs[1]])
        if node.kind == "Conv" and node.inputs[1] in stored:
            int8_weights[named(node.outputs[0])] = stored[node.inputs[1]]
    return Census(dict(layers), int8_weights, scales)


def _differences(expected: Census, made: Census) -> str:
    """Return how two censuses differ, as text. Empty: they are equal."""
    kinds = sorted({*expected.layers, *made.layers})
    counts = [(kind, made.layers.get(kind, 0), expected.layers.get(kind, 0)) for kind in kinds]
    found = [f"{got} {kind}, expected {wanted}" for kind, got, wanted in counts if got != wanted]
    if expected.scales != made.scales:
        found.append("other scales")
    if set(expected.weights) != set(made.weights) or any(
        not np.array_equal(one, two)
        for name in expected.weights
        for one, two in zip(expected.weights[name], made.weights[name])
    ):
        found.append("other INT8 weights")
    return "; ".join(found)


def package(spec: bytes, weights: bytes, folder: Path) -> Path:
    """Write a CoreML package (`.mlpackage`), and return its folder. Equal content gives equal bytes.

    Args:
        spec: specification of the model, as serialised protobuf.
        weights: content of `weight.bin`.
        folder: folder to make.
    """
    items = {"model.mlmodel": "CoreML Model Specification", "weights": "CoreML Model Weights"}
    entries = {
        str(uuid.uuid5(uuid.NAMESPACE_OID, name)): {
            "author": "com.apple.CoreML",
            "description": description,
            "name": name,
            "path": f"com.apple.CoreML/{name}",
        }
        for name, description in items.items()
    }
    manifest = {"fileFormatVersion": "1.0.0", "itemInfoEntries": entries, "rootModelIdentifier": next(iter(entries))}
    data = folder / "Data" / "com.apple.CoreML"
    (data / "weights").mkdir(parents=True)
    (data / "model.mlmodel").write_bytes(spec)
    (data / "weights" / "weight.bin").write_bytes(weights)
    (folder / "Manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return folder


def content(model: Any, about: Dict[str, str]) -> Tuple[Any, bytes]:
    """Return the specification of a converted model, with `about` as its only metadata, and the content of its `weight.bin`."""
    spec = model.get_spec()
    spec.description.metadata.userDefined.clear()
    spec.description.metadata.userDefined.update(about)
    return spec, (Path(model.weights_dir) / "weight.bin").read_bytes()


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress bars that coremltools writes to stderr."""
    with redirect_stderr(io.StringIO()):
        yield
