"""Input and output of the networks of a bundle: one form for every precision, since any of them may be put in another's place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx

from yolo_compress.errors import GateFailed

FLOAT = onnx.TensorProto.FLOAT
Tensor = tuple[str, int, tuple[int, ...]]  # name, type, shape; 0 stands for an open batch


def check_signatures(files: Sequence[Path], imgsz_hw: tuple[int, int], classes: int) -> None:
    """Asserts `images` [B, 3, H, W] and `output0` [B, 4 + classes, A], float32, with the same B and A in all files.

    Raises:
        GateFailed: names the file.
    """
    found = {file: _signature(file) for file in files}
    for file, (inputs, outputs) in found.items():
        whole = [*inputs, *outputs]
        fits = [(name, kind) for name, kind, _ in whole] == [("images", FLOAT), ("output0", FLOAT)]
        if not fits or whole[0][2][1:] != (3, *imgsz_hw) or whole[1][2][1:2] != (4 + classes,) or len(whole[1][2]) != 3:
            raise GateFailed(
                f"{file.name}: takes {inputs}, gives {outputs}; images [B, 3, {imgsz_hw[0]}, {imgsz_hw[1]}] and output0 "
                f"[B, {4 + classes}, anchors], both float32, expected"
            )
    first = files[0]
    for file in files[1:]:
        if found[file] != found[first]:
            raise GateFailed(f"{file.name}: takes and gives {found[file]}, {first.name} {found[first]}; export again")


def _signature(file: Path) -> tuple[list[Tensor], list[Tensor]]:
    graph = onnx.load(str(file), load_external_data=False).graph
    held = {tensor.name for tensor in graph.initializer}
    return [_tensor(one) for one in graph.input if one.name not in held], [_tensor(one) for one in graph.output]


def _tensor(value: onnx.ValueInfoProto) -> Tensor:
    kind = value.type.tensor_type
    return value.name, kind.elem_type, tuple(side.dim_value for side in kind.shape.dim)
