"""Read the metadata of an ONNX file without the onnx package. Only the top-level protobuf fields are parsed, not the graph."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any, Dict, Iterator, Tuple

from ..errors import EngineError

NEEDS_NMS = "needs_nms"  # key of the metadata; see `needs_nms`
_METADATA_PROPS = 14  # ModelProto.metadata_props, repeated StringStringEntryProto{key = 1, value = 2}


def _varint(data: memoryview, at: int) -> Tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("varint too long")


def _fields(data: memoryview) -> Iterator[Tuple[int, memoryview]]:
    """Yield (field number, payload) of each length-delimited protobuf field. Other fields are skipped."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            _, at = _varint(data, at)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        elif kind == 2:
            size, at = _varint(data, at)
            if at + size > len(data):
                raise ValueError("field runs past the end")
            yield tag >> 3, data[at : at + size]
            at += size
        else:
            raise ValueError(f"wire type {kind}")


def metadata(path: Path) -> Dict[str, str]:
    """Return the `metadata_props` of an ONNX file.

    Raises:
        EngineError: the file is not ONNX, or is truncated.
    """
    try:
        props = {}
        for number, payload in _fields(memoryview(path.read_bytes())):
            if number == _METADATA_PROPS:
                entry = {key: bytes(value).decode("utf-8") for key, value in _fields(payload)}
                props[entry[1]] = entry.get(2, "")
        return props
    except (ValueError, IndexError, KeyError) as error:
        raise EngineError(f"{path}: not a readable ONNX file ({error}); export it again") from error


def names_and_imgsz(path: Path) -> Tuple[Tuple[str, ...], Tuple[int, int]]:
    """Return the class names and the input size (height, width) in px, from metadata in the format of Ultralytics.

    Raises:
        EngineError: the metadata lacks class names or input size.
    """
    props = metadata(path)
    try:
        named: Any = _literal(props["names"])
        size: Any = _literal(props["imgsz"])
        names = tuple(str(named[i]) for i in range(len(named)))
        return names, (int(size[0]), int(size[1]))
    except (KeyError, ValueError, SyntaxError, TypeError, IndexError, RecursionError, MemoryError) as error:
        raise EngineError(
            f"{path}: no usable class names and imgsz in its metadata ({error!r}, keys {sorted(props)}); "
            "pass names and imgsz, or export with this package or Ultralytics"
        ) from error


def needs_nms(path: Path) -> bool:
    """Return whether the boxes of the model need NMS. They do unless the metadata says otherwise, as for YOLO26.

    Raises:
        EngineError: the file is not ONNX, or is truncated.
    """
    return metadata(path).get(NEEDS_NMS) != "False"


def _literal(text: str) -> Any:
    """Parse JSON or a Python literal, since Ultralytics writes str(dict)."""
    try:
        return json.loads(text)
    except ValueError:
        return ast.literal_eval(text)
