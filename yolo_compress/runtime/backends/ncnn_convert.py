"""Convert an ONNX file to NCNN's graph (.param) and weights (.bin): pnnx converts the float graph, and this module adds the rest.

pnnx drops names and knows no INT8. It does not change float32 weights, so each convolution is recognised by its weights.
"""

from __future__ import annotations

import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from ..errors import EngineError, NotConverted, RuntimeUnavailable
from . import onnx_graph
from .onnx_graph import Fault, Graph

INSTALL = "pip install ncnn pnnx onnx"
LIMIT_S = 900
MAGIC = "7767517"  # first line of a .param file
CONVOLUTIONS = ("Convolution", "ConvolutionDepthWise")
ACTIVATIONS = ("Swish", "ReLU", "HardSwish", "Mish", "GELU", "SELU", "Sigmoid")
# Keys of a convolution in a .param file (ncnn's wiki, "operators").
OUTPUTS, HAS_BIAS, WEIGHTS, INT8_SCALES = 0, 5, 6, 8
# Value of INT8_SCALES: one scale for each output channel, then one for the input. In a depthwise convolution, 2 would be one scale
# for all channels.
WEIGHTS_AND_INPUT = {"Convolution": "2", "ConvolutionDepthWise": "1"}
# Number type of the weights of a convolution, before them in a .bin file.
FLOAT32_TAG, FLOAT16_TAG = b"\0\0\0\0", b"\x47\x6b\x30\x01"


class Layer(NamedTuple):
    """One line of a .param file: type, name, inputs, outputs, and the parameters by number, as text."""

    kind: str
    name: str
    reads: Tuple[str, ...]
    writes: Tuple[str, ...]
    keys: Dict[int, str]


class Convolution(NamedTuple):
    """A convolution of the ONNX file.

    Attributes:
        name: name of its node.
        input_scale: scale of its INT8 input: an INT8 value is round(value / scale). None: the convolution stays float.
        weight_scale_O: scale of the weights of each output channel.
    """

    name: str
    input_scale: Optional[np.ndarray]
    weight_scale_O: Optional[np.ndarray]


def read_param(file: Path) -> List[Layer]:
    """Return the layers of a .param file in order.

    Raises:
        EngineError: the file is not of NCNN's text format.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        if lines[0] != MAGIC:
            raise ValueError(f"begins with {lines[0][:20]!r}")
        layers = []
        for words in (line.split() for line in lines[2:] if line.strip()):
            first, last = 4 + int(words[2]), 4 + int(words[2]) + int(words[3])
            keys = {int(key): value for key, _, value in (word.partition("=") for word in words[last:])}
            layers.append(Layer(words[0], words[1], tuple(words[4:first]), tuple(words[first:last]), keys))
        return layers
    except (OSError, ValueError, IndexError) as error:
        raise EngineError(f"{file}: not a graph of NCNN ({error}); build the engine again") from error


def faults(graph: Graph) -> Iterator[Fault]:
    """Yield what NCNN, or this converter, cannot do with a graph. What pnnx refuses is only known when it runs."""
    if graph.shapes[graph.input][0] != 1:
        yield graph.input, f"takes {graph.shapes[graph.input][0]} images, and NCNN one at a time"
    dequantised = {node.outputs[0]: node for node in graph.nodes if node.kind == onnx_graph.DEQUANTIZE}
    owner: Dict[bytes, str] = {}
    for node in graph.nodes:
        if node.kind != "Conv":
            continue
        stored, scale_O = graph.constants.get(node.inputs[1]), None
        if node.inputs[1] in dequantised:
            stored, scale_O = (graph.constants.get(name) for name in dequantised[node.inputs[1]].inputs[:2])
        if stored is None:
            yield node.label, "has weights that are not stored"
            continue
        values = stored.astype("<f4")
        if scale_O is not None:
            if np.size(scale_O) != len(values):
                yield node.label, f"has {np.size(scale_O)} scales for the weights of {len(values)} outputs"
                continue
            values = values * scale_O.astype("<f4").reshape((-1,) + (1,) * (values.ndim - 1))
        other = owner.setdefault(values.tobytes(), node.label)
        if other != node.label:
            yield node.label, f"and {other} have equal weights"


def convert(file: Path, folder: Path, imgsz: Sequence[int], precision: str) -> Tuple[Path, Path, int]:
    """Convert an ONNX file. Return the .param file, the .bin file and the number of image channels.

    For int8, each convolution whose input and weights have Q/DQ nodes gets their scales, and its weights become INT8 value times
    scale. NCNN quantises them when it loads the file, which gives the INT8 values of the ONNX file. All else is float.

    Args:
        folder: empty folder for both files.
        imgsz: height and width of the input, px.
        precision: fp32, fp16 (weights stored as float16) or int8.

    Raises:
        RuntimeUnavailable: pnnx or onnx is missing.
        EngineError: the file takes images of another size, or `faults` finds a fault. Or the precision is int8, and the file has no
            Q/DQ nodes or an INT8 tensor with a zero point. Or pnnx rejects the graph or changes its weights.
    """
    onnx = onnx_graph.require(INSTALL)
    graph = onnx_graph.read(file, imgsz, INSTALL)
    onnx_graph.refuse(faults(graph), file, "NCNN")
    model, channels = onnx.load(str(file)), graph.shapes[graph.input][1]
    convolutions = _to_float32(model.graph, file)
    if precision == "int8" and all(one.input_scale is None for one in convolutions.values()):
        raise EngineError(f"{file}: int8 requested, but the graph has no Q/DQ nodes; use the int8 export")
    onnx.save(model, str(folder / "model.onnx"))
    _run_pnnx(folder, (1, channels, *imgsz))
    param, weights = folder / "model.ncnn.param", folder / "model.ncnn.bin"
    _complete(param, weights, convolutions, precision == "fp16")
    return param, weights, channels


def _to_float32(graph: Any, file: Path) -> Dict[bytes, Convolution]:
    """Remove the Q/DQ and Cast nodes of an ONNX graph in place. Return its convolutions by the bytes of their float32 weights.

    Raises:
        EngineError: an INT8 tensor has a zero point.
    """
    from onnx import numpy_helper

    arrays = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    source = {output: node for node in graph.node for output in node.output}
    stands_for: Dict[str, str] = {}  # output of a removed node -> the tensor to read instead
    scales: Dict[str, np.ndarray] = {}  # output of a DequantizeLinear node -> its scale
    for node in graph.node:
        if node.op_type == "Cast":
            stands_for[node.output[0]] = node.input[0]
        if node.op_type != "DequantizeLinear":
            continue
        output, scale = node.output[0], np.atleast_1d(arrays[node.input[1]]).astype(np.float32)
        scales[output] = scale
        if len(node.input) > 2 and arrays[node.input[2]].any():
            raise EngineError(f"{file}: {output} has a zero point; NCNN takes symmetric INT8, as in int8.onnx")
        if node.input[0] in arrays:
            values = arrays[node.input[0]]
            arrays[output] = values.astype(np.float32) * scale.reshape((-1,) + (1,) * (values.ndim - 1))
        else:
            stands_for[output] = source[node.input[0]].input[0]
    found: Dict[bytes, Convolution] = {}
    for node in graph.node:
        if node.op_type == "Conv":
            both = node.input[0] in scales and node.input[1] in scales
            two = [scales[name] if both else None for name in node.input[:2]]
            found[arrays[node.input[1]].astype("<f4").tobytes()] = Convolution(node.name, *two)
    kept = [node for node in graph.node if node.op_type not in ("QuantizeLinear", "DequantizeLinear", "Cast")]
    source = {output: node for node in kept for output in node.output}
    for output in graph.output:  # its last node may be gone
        name = _followed(output.name, stands_for)
        if name != output.name:
            source[name].output[list(source[name].output).index(name)] = output.name
            stands_for[name] = output.name
            stands_for.pop(output.name)
    for node in kept:
        for index, name in enumerate(node.input):
            node.input[index] = _followed(name, stands_for)
        for attribute in node.attribute:
            if attribute.name == "value":
                attribute.t.CopyFrom(_float32(numpy_helper.to_array(attribute.t), attribute.t.name))
    used = {name for node in kept for name in node.input}
    stored = [_float32(value, name) for name, value in arrays.items() if name in used]
    for ends in (graph.input, graph.output):
        for one in ends:
            one.type.tensor_type.elem_type = 1  # FLOAT
    for part, content in ((graph.node, kept), (graph.initializer, stored), (graph.value_info, [])):
        del part[:]
        part.extend(content)
    return found


def _followed(name: str, stands_for: Dict[str, str]) -> str:
    while name in stands_for:
        name = stands_for[name]
    return name


def _float32(value: np.ndarray, name: str) -> Any:
    """Return an array as an ONNX tensor, float16 as float32."""
    from onnx import numpy_helper

    return numpy_helper.from_array(value.astype(np.float32) if value.dtype == np.float16 else value, name)


def _pnnx() -> Path:
    """Return the program pnnx. Its Python package is not imported, because that imports torch, which a robot lacks.

    Raises:
        RuntimeUnavailable: pnnx is not installed.
    """
    try:
        found = find_spec("pnnx")
    except ValueError:
        found = None
    if found is None or found.origin is None:
        raise RuntimeUnavailable("pnnx is not installed", INSTALL)
    return Path(found.origin).parent / "pnnx"


def require() -> None:
    """Check that an ONNX file can be converted here.

    Raises:
        RuntimeUnavailable: pnnx or onnx is missing.
    """
    _pnnx()
    onnx_graph.require(INSTALL)


def _run_pnnx(folder: Path, shape_BCHW: Sequence[int]) -> None:
    """Convert `model.onnx` in `folder` to `model.ncnn.param` and `model.ncnn.bin`, in float32."""
    shape = ",".join(map(str, shape_BCHW))
    command = [str(_pnnx()), "model.onnx", f"inputshape=[{shape}]", "fp16=0"]
    try:
        done = subprocess.run(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"pnnx does not run: {error}") from error
    if done.returncode or not (folder / "model.ncnn.param").is_file() or not (folder / "model.ncnn.bin").is_file():
        last = (done.stdout.decode("utf-8", "replace").strip().splitlines() or ["no output"])[-1]
        raise NotConverted(f"pnnx ended with code {done.returncode}: {last}")


def _complete(param: Path, weights: Path, convolutions: Dict[bytes, Convolution], half: bool) -> None:
    """Write names and INT8 scales of the convolutions into both files, and the weights as float16 if `half` is true.

    Raises:
        NotConverted: the graph has other convolutions, or the weights file has another length.
    """
    header, content = param.read_text(encoding="utf-8").splitlines()[:2], weights.read_bytes()
    missing, parts, lines, at = set(convolutions), [], [], 0
    owner: Dict[str, str] = {}  # output -> convolution that writes it
    for kind, name, reads, writes, keys in read_param(param):
        start = at
        if kind == "MemoryData":
            at += 4 * int(np.prod([int(keys.get(axis, "0")) or 1 for axis in (0, 1, 2)]))
            parts.append(content[start:at])
        elif kind in CONVOLUTIONS:
            start, at = at + len(FLOAT32_TAG), at + len(FLOAT32_TAG) + 4 * int(keys[WEIGHTS])
            key, end = content[start:at], at + 4 * int(keys[OUTPUTS]) * int(keys.get(HAS_BIAS, "0"))
            bias, at = content[at:end], end
            if key not in convolutions:
                raise NotConverted(f"pnnx changed the weights of {name}; NCNN cannot be built from this file")
            missing.discard(key)
            name, input_scale, weight_scale_O = convolutions[key]
            owner[writes[0]] = name
            halved = np.frombuffer(key, "<f4").astype("<f2").tobytes()
            parts += [FLOAT16_TAG, halved, b"\0" * (-len(halved) % 4)] if half else [FLOAT32_TAG, key]
            parts.append(bias)
            if input_scale is not None and weight_scale_O is not None:
                keys[INT8_SCALES] = WEIGHTS_AND_INPUT[kind]
                parts.append((1 / np.append(weight_scale_O, input_scale)).astype("<f4").tobytes())
        elif kind in ACTIVATIONS and reads[0] in owner:
            name = f"{owner[reads[0]]}+{kind}"  # its time is part of the convolution's
        words = [kind, name, str(len(reads)), str(len(writes)), *reads, *writes]
        lines.append(" ".join(words + [f"{number}={value}" for number, value in keys.items()]))
    if missing or at != len(content):
        raise NotConverted(
            f"pnnx changed the graph: {len(missing)} of {len(convolutions)} convolutions are gone, {len(content) - at} bytes of "
            "weights are left over; NCNN cannot be built from this file"
        )
    param.write_text("\n".join(header + lines) + "\n", encoding="utf-8")
    weights.write_bytes(b"".join(parts))
