"""An ONNX file from anywhere: every byte of it is read here, and nothing outside its folder."""

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

MAX_BYTES = 2**31 - 1  # protobuf's own limit for a message
MAX_NODES = 100_000  # functions taken in; YOLOv8x has 500, a large language model 10,000
MAX_FUNCTION_DEPTH = 50  # functions within functions
MAX_TENSOR_BYTES = 2**33  # stored beside the file
READ_BY_NAME = {Q, DQ, *WEIGHTED, *POOLS, "Add", "Cast", "Identity", "MatMul", "TopK"}


def read(path: Path) -> Graph:
    """The graph of a file, with the types and shapes that can be inferred.

    Raises:
        EnvironmentLacks: There is no such file.
        StorageError: It cannot be read.
        CorruptArtifact: It is not a whole ONNX model, or its weights lie outside its folder.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CorruptArtifact(f"{path}: larger than 2 GiB, which ONNX files cannot be; export it again")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise EnvironmentLacks(f"{path}: no such file; give the path of an .onnx file") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from error
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise CorruptArtifact(f"{path}: not an ONNX file, or cut short ({error}); export it again") from error
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
        except shape_inference.InferenceError as error:  # rule `checker` reports it; the others see what is declared
            return Graph(model, str(path), str(error).strip().splitlines()[0])
    except (RuntimeError, ValueError) as error:
        raise CorruptArtifact(f"{path}: cannot be taken apart: {error}; export it again") from error


def _load_external(model: onnx.ModelProto, path: Path) -> None:
    """Read the tensors that are stored beside the file.

    onnx checks the place only when it opens the file, with an error of its own for each version; the sizes it does not check.
    """
    folder, read = path.resolve().parent, 0
    for tensor in _tensors(model.graph):
        if not external_data_helper.uses_external_data(tensor):
            continue
        try:
            info = external_data_helper.ExternalDataInfo(tensor)
        except ValueError as error:
            raise CorruptArtifact(f"{path}: tensor {tensor.name} lies at no place: {error}; export it again") from error
        where = f"{path}: tensor {tensor.name} is stored in {info.location!r}"
        file = (folder / info.location).resolve()
        if not info.location or Path(info.location).is_absolute() or not file.is_relative_to(folder):
            raise CorruptArtifact(f"{where}, outside the model's folder; not opened: get a file that you can trust")
        if not file.is_file():
            raise CorruptArtifact(f"{where}, which is not there; copy it next to the model")
        start, length, size = info.offset or 0, info.length or 0, file.stat().st_size
        if start + length > size:
            raise CorruptArtifact(f"{where} up to byte {start + length}, but that file has {size}; copy it again")
        read += length or size - start
        if read > MAX_TENSOR_BYTES:
            raise CorruptArtifact(f"{path}: its tensors have more than {MAX_TENSOR_BYTES >> 30} GiB; no detector has")
        try:
            external_data_helper.load_external_data_for_tensor(tensor, str(folder))
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            raise CorruptArtifact(f"{where}, which cannot be read: {error}") from error
        tensor.data_location = TensorProto.DEFAULT
        del tensor.external_data[:]


def _check_size(model: onnx.ModelProto, path: Path) -> None:
    """The nodes are few, functions taken in: each may call others twice, and 1.4 kB of them were 82 s.

    Raises:
        CorruptArtifact: Too many, or functions that call themselves.
    """
    functions = {(one.domain, one.name): one for one in model.functions}
    sizes: dict[tuple[str, str], int] = {}
    open_: set[tuple[str, str]] = set()

    def size(nodes: Iterable[onnx.NodeProto]) -> int:
        total = 0
        for node in nodes:
            key = (node.domain, node.op_type)
            total += of_function(key) if key in functions else 1
            for attribute in node.attribute:
                for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                    total += size(inner.node)
            if total > MAX_NODES:
                raise CorruptArtifact(f"{path}: more than {MAX_NODES} nodes, functions taken in; no detector has")
        return total

    def of_function(key: tuple[str, str]) -> int:
        if key in open_ or len(open_) >= MAX_FUNCTION_DEPTH:
            raise CorruptArtifact(
                f"{path}: function {key[1]} calls itself, or too many others in turn; export it again"
            )
        if key not in sizes:
            open_.add(key)
            sizes[key] = size(functions[key].node)
            open_.remove(key)
        return sizes[key]

    size(model.graph.node)
    for key in functions:
        of_function(key)


def _tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """Every tensor of a graph and of the graphs inside its nodes."""
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
    """Every tensor is made once, before it is read, and no node lacks inputs: what the walks of `Graph` rest on."""
    made = {item.name for item in graph.input} | {item.name for item in graph.initializer}
    made |= {item.values.name for item in graph.sparse_initializer}
    for node in graph.node:
        texts = (
            node.op_type,
            node.domain,
            node.name,
            *node.input,
            *node.output,
            *(item.name for item in node.attribute),
        )
        if not all(isinstance(text, str) for text in texts):  # protobuf gives bytes where they are not UTF-8
            raise CorruptArtifact(f"{path}: a name in it is not text, so the file was altered; get it again")
        if len(node.input) < _least_inputs(node, opset) or not any(node.output):
            raise CorruptArtifact(
                f"{path}: {node.op_type} {node.name} has {len(node.input)} inputs, {len(node.output)} outputs: too few; "
                "export it again"
            )
        if lost := [name for name in node.input if name and name not in made]:
            raise CorruptArtifact(
                f"{path}: {node.op_type} {node.name} reads {lost[0]}, which no node before it makes; export it again"
            )
        if twice := [name for name in node.output if name and name in made]:
            raise CorruptArtifact(f"{path}: tensor {twice[0]} is made twice; export it again")
        made.update(name for name in node.output if name)
    if lost := [item.name for item in graph.output if item.name not in made]:
        raise CorruptArtifact(f"{path}: no node makes the output {lost[0]}; export it again")


def _least_inputs(node: onnx.NodeProto, opset: int) -> int:
    """Inputs that the standard asks of an operator, 0 of one that it does not know.

    ONNX Runtime has Q and DQ of its own domain with the same inputs; rules read nodes of those names in any domain.
    """
    if node.domain not in ("", "ai.onnx") and node.op_type not in READ_BY_NAME:
        return 0
    try:
        return int(defs.get_schema(node.op_type, opset, "").min_input)
    except defs.SchemaError:
        return 0
