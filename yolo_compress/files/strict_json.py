"""JSON files of others: a mapping that `runtime.json_text` accepts, or an error that names the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from yolo_compress.errors import CompressError, StorageError
from yolo_compress.runtime import json_text


def load(
    path: Path, error: type[CompressError], hint: str = "", constant: Callable[[str], Any] = json_text.refuse
) -> dict[str, Any]:
    """Reads a JSON file whose top level is a mapping.

    Args:
        path: the file.
        error: class raised for a file that is wrong.
        hint: what to do about a file that is wrong, "; run it again".
        constant: gives what NaN and infinity stand for; refuses them by default.

    Raises:
        error: too large, not UTF-8, not JSON, nested too deeply, a key twice, NaN, infinity or a number beyond a float's.
        StorageError: it cannot be read.
    """
    try:
        found = json_text.read(path, constant)
    except OSError as failed:
        raise StorageError(f"{path}: cannot be read: {failed.strerror}") from failed
    except ValueError as failed:
        raise error(f"{path}: no JSON that can be used ({failed}){hint}") from failed
    if not isinstance(found, dict):
        raise error(f"{path}: holds a {type(found).__name__}, expected a mapping{hint}")
    return found
