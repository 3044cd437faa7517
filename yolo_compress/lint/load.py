"""Load an ONNX file, which may come from an untrusted source. No file outside the folder of the ONNX file is opened."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, defs, external_data_helper, inliner, shape_inference

from yolo_compress.errors import CorruptArtifact, EnvironmentLacks, StorageError
from yolo_compress.lint.graph import WEIGHTED, Graph
from yolo_compress.lint.node import DQ, Q
from yolo_compress.lint.placement import POOLS

MAX_BYTES = 2**31 - 1  # limit of protobuf for a message
MAX_NODES = 100_000  # with functions inlined; YOLOv8x has 500, a large language model 10,000
MAX_FUNCTION_DEPTH = 50  # nested function calls
MAX_TENSOR_BYTES = 2**33  # total size of external data
READ_BY_NAME = {Q, DQ, *WEIGHTED, *POOLS, "Add", "Cast", "Identity", "MatMul", "TopK"}


def read(path: Path) -> Graph:
    """Read an ONNX file, infer its types and shapes, and return it as a `Graph`.

    Raises:
        EnvironmentLacks: There is no such file.
        StorageError: The file cannot be read.
        CorruptArtifact: The file is not a complete ONNX model, or it refers to weights outside its folder.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CorruptArtifact(f"{path}: larger than 2 GiB, the limit of ONNX files; export it again")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise EnvironmentLacks(f"{path}: no such file; give the path of an .onnx file") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from error
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise CorruptArtifact(f"{path}: not an ONNX file, or truncated ({error}); export it again") from error
    opset = next((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), None)
    if not model.graph.node or opset is None:
        raise CorruptArtifact(f"{path}: not an ONNX model: it has no nodes or no operator set; export it again")
    _check_size(model, path)
    _load_external(model, path)
    try:
        if model.functions:
            model = inliner.inline_local_functions(model)
        _check_order(model.graph, opset, path)
        try:
            return Graph(shape_inference.infer_shapes(model, data_prop=True), str(path))
        except (
            shape_inference.InferenceError
        ) as error:  # rule `checker` reports it; other rules use the declared shapes
            return Graph(model, str(path), str(error).strip().splitlines()[0])
    except (RuntimeError, ValueError) as error:
        raise CorruptArtifact(f"{path}: the graph cannot be analysed: {error}; export it again") from error


def _load_external(model: onnx.ModelProto, path: Path) -> None:
    """Read the tensors that are stored in other files of the folder.

    onnx checks the location only on opening, with a different error in each version, and it does not check sizes.
    """
    folder, read = path.resolve().parent, 0
    for tensor in _tensors(model.graph):
        if not external_data_helper.uses_external_data(tensor):
            continue
        try:
            info = external_data_helper.ExternalDataInfo(tensor)
        except ValueError as error:
            raise CorruptArtifact(
                f"{path}: tensor {tensor.name} has an invalid location: {error}; export it again"
            ) from error
        where = f"{path}: tensor {tensor.name} is stored in {info.location!r}"
        file = (folder / info.location).resolve()
        if not info.location or Path(info.location).is_absolute() or not file.is_relative_to(folder):
            raise CorruptArtifact(
                f"{where}, outside the model's folder; it was not opened; use a file from a trusted source"
            )
        if not file.is_file():
            raise CorruptArtifact(f"{where}, which does not exist; copy it into the model's folder")
        start, length, size = info.offset or 0, info.length or 0, file.stat().st_size
        if start + length > size:
            raise CorruptArtifact(f"{where} up to byte {start + length}, but that file has {size} bytes; copy it again")
        read += length or size - start
        if read > MAX_TENSOR_BYTES:
            raise CorruptArtifact(
                f"{path}: its tensors have more than {MAX_TENSOR_BYTES >> 30} GiB, too much for a detector; do not use it"
            )
        try:
            external_data_helper.load_external_data_for_tensor(tensor, str(folder))
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            raise CorruptArtifact(f"{where}, which cannot be read: {error}") from error
        tensor.data_location = TensorProto.DEFAULT
        del tensor.external_data[:]


def _check_size(model: onnx.ModelProto, path: Path) -> None:
    """Check that the model has at most MAX_NODES nodes once its functions are inlined.

    If each function calls another one twice, the number of nodes doubles per function: a file of 1.4 kB took 82 s.

    Raises:
        CorruptArtifact: There are too many nodes, or a function calls itself.
    """
    functions = {(one.domain, one.name): one for one in model.functions}
    sizes: dict[tuple[str, str], int] = {}
    expanding: set[tuple[str, str]] = set()

    def size(nodes: Iterable[onnx.NodeProto]) -> int:
        total = 0
        for node in nodes:
            key = (node.domain, node.op_type)
            total += function_size(key) if key in functions else 1
            for attribute in node.attribute:
                for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                    total += size(inner.node)
            if total > MAX_NODES:
                raise CorruptArtifact(
                    f"{path}: more than {MAX_NODES} nodes with functions inlined, too many for a detector; do not use it"
                )
        return total

    def function_size(key: tuple[str, str]) -> int:
        if key in expanding or len(expanding) >= MAX_FUNCTION_DEPTH:
            raise CorruptArtifact(
                f"{path}: function {key[1]} calls itself, or calls are nested more than {MAX_FUNCTION_DEPTH} deep; "
                "export it again"
            )
        if key not in sizes:
            expanding.add(key)
            sizes[key] = size(functions[key].node)
            expanding.remove(key)
        return sizes[key]

    size(model.graph.node)
    for key in functions:
        function_size(key)


def _tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """Yield every stored tensor of a graph and of the graphs inside its nodes."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                yield from _tensors(inner)


def _check_order(graph: onnx.GraphProto, opset: int, path: Path) -> None:
    """Check the assumptions of `Graph`: each tensor is computed once, before it is read, and no node lacks an input.

    Raises:
        CorruptArtifact: The graph breaks one of these rules, or a name is not UTF-8.
    """
    defined = {item.name for item in graph.input} | {item.name for item in graph.initializer}
    defined |= {item.values.name for item in graph.sparse_initializer}
    for node in graph.node:
        texts = (
            node.op_type,
            node.domain,
            node.name,
            *node.input,
            *node.output,
            *(item.name for item in node.attribute),
        )
        if not all(isinstance(text, str) for text in texts):  # protobuf returns bytes if they are not UTF-8
            raise CorruptArtifact(f"{path}: a name is not valid UTF-8, so the file is damaged; get it again")
        if len(node.input) < _least_inputs(node, opset) or not any(node.output):
            raise CorruptArtifact(
                f"{path}: {node.op_type} {node.name} has {len(node.input)} inputs and {len(node.output)} outputs, too few; "
                "export it again"
            )
        if lost := [name for name in node.input if name and name not in defined]:
            raise CorruptArtifact(
                f"{path}: {node.op_type} {node.name} reads {lost[0]}, which no earlier node computes; export it again"
            )
        if twice := [name for name in node.output if name and name in defined]:
            raise CorruptArtifact(f"{path}: tensor {twice[0]} is computed twice; export it again")
        defined.update(name for name in node.output if name)
    if lost := [item.name for item in graph.output if item.name not in defined]:
        raise CorruptArtifact(f"{path}: no node computes the output {lost[0]}; export it again")


def _least_inputs(node: onnx.NodeProto, opset: int) -> int:
    """Return how many inputs the ONNX standard requires for the operator of a node, or 0 if the operator is unknown.

    Rules read some operators by name in any domain: ONNX Runtime has its own Q and DQ with the same inputs.
    """
    if node.domain not in ("", "ai.onnx") and node.op_type not in READ_BY_NAME:
        return 0
    try:
        return int(defs.get_schema(node.op_type, opset, "").min_input)
    except defs.SchemaError:
        return 0
