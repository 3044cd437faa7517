"""Find the layer of an INT8 file that an engine library computes wrongly on this processor."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.utils import Extractor

from yolo_compress.evaluate.exported_files import literal
from yolo_compress.export.qdq import ELEMENTWISE
from yolo_compress.runtime.engine import BACKENDS, open_engine

JUMP = 10.0  # a layer is wrong if its error is this many times the largest error of the layers before it
LEAST_ERROR = 0.005  # a smaller error counts as this; rounding alone moves a few values by one INT8 step
PASSED = (ELEMENTWISE - {"Add"}) | {"QuantizeLinear", "DequantizeLinear"}
_OUTPUT, _SHAPE = "yolo_compress_values", "yolo_compress_shape"


def first_wrong_layer(file: Path, runtime: str, image_3HW: np.ndarray) -> str:
    """Compare the outputs of an INT8 file's layers, as an engine library computes them, with the nodes run one by one.

    For each layer in turn, an engine is built from the part of the file that ends at the quantised output of this layer. The error
    is the mean difference of the values, relative to their mean magnitude.

    Args:
        file: INT8 ONNX file with Q/DQ nodes.
        runtime: key of `BACKENDS`.
        image_3HW: letterboxed float32 array, values 0 to 1.

    Returns:
        Text such as "the first wrong layer is /model.2/cv2/conv/Conv (error 0.15, at most 0.0002 before it)", if the error of a layer
        jumps. If none does, the text says so, and where the error grows most.

    Raises:
        EngineError: the library rejects a part of the file.
    """
    worst, before, described = -1.0, 0.0, ""
    with tempfile.TemporaryDirectory() as scratch:
        for number, (layer, part) in enumerate(_parts(file)):
            cut, out = Path(scratch, f"{number}.onnx"), Path(scratch, f"engine-{number}")
            onnx.save(part, str(cut))
            batch, _, height, width = (dim.dim_value for dim in part.graph.input[0].type.tensor_type.shape.dim)
            images_BCHW = np.repeat(image_3HW[None], batch or 1, axis=0)
            values = part.graph.output[0].type.tensor_type.shape.dim[1].dim_value
            BACKENDS[runtime].build(cut, out, "int8", [str(index) for index in range(values - 4)], (height, width))
            expected = literal(cut)(images_BCHW)
            with open_engine(out) as engine:
                error = float(
                    np.abs(engine(images_BCHW) - expected).mean() / max(float(np.abs(expected).mean()), 1e-12)
                )
            if error - before > worst:
                worst, described = error - before, f"{layer} (error {error:.2g}, at most {before:.2g} before it)"
            if error > JUMP * max(before, LEAST_ERROR):
                return f"the first wrong layer is {layer} (error {error:.2g}, at most {before:.2g} before it)"
            before = max(before, error)
    return f"no layer's error jumps; it grows most at {described}" if described else "no layer can be compared"


def _parts(file: Path) -> Iterator[tuple[str, onnx.ModelProto]]:
    """Yield name of the convolution, and the part of the graph that ends at its quantised output, as (batch, channels, values)."""
    model = onnx.shape_inference.infer_shapes(onnx.load(str(file)))
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in model.graph.value_info
    }
    made_by = {output: node for node in model.graph.node for output in node.output}
    cutter, images = Extractor(model), model.graph.input[0].name
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in made_by:
            continue
        layer = _convolution(node.input[0], made_by)
        shape = shapes.get(node.output[0], [])
        # the backends take a part for a detector, whose output has 4 rows for the box and at least one for the classes
        if layer is None or len(shape) != 4 or shape[1] < 5:
            continue
        part = cutter.extract_model([images], [node.output[0]])
        batch, channels, height, width = shape
        part.graph.initializer.append(numpy_helper.from_array(np.array([0, channels, -1], np.int64), _SHAPE))
        part.graph.node.append(helper.make_node("Reshape", [node.output[0], _SHAPE], [_OUTPUT]))
        del part.graph.output[:]
        part.graph.output.append(
            helper.make_tensor_value_info(_OUTPUT, onnx.TensorProto.FLOAT, [batch or None, channels, height * width])
        )
        yield layer, part


def _convolution(tensor: str, made_by: Mapping[str, onnx.NodeProto]) -> str | None:
    """Return the name of the convolution that `tensor` comes from, through its activation and quantisation. None: another node."""
    while tensor in made_by and made_by[tensor].op_type in PASSED:
        tensor = made_by[tensor].input[0]
    node = made_by.get(tensor)
    return node.name if node is not None and node.op_type == "Conv" else None
