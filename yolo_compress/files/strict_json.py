"""Read JSON files strictly, because other programs may have written or damaged them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from yolo_compress.errors import CompressError, StorageError
from yolo_compress.runtime import json_text


def load(
    path: Path, error: type[CompressError], hint: str = "", constant: Callable[[str], Any] = json_text.refuse
) -> dict[str, Any]:
    """Read a JSON file whose top level is a mapping.

    Args:
        path: The file.
        error: Class to raise for an invalid file.
        hint: End of the error message for an invalid file, such as "; run it again".
        constant: Returns the value for the words NaN and Infinity. By default they are an error.

    Raises:
        error: The file is too large, not UTF-8, not JSON or nested too deeply. Or it has a repeated key, NaN, infinity or a number
            larger than a float.
        StorageError: The file cannot be read.
    """
    try:
        document = json_text.read(path, constant)
    except OSError as failed:
        raise StorageError(f"{path}: cannot be read: {failed.strerror}") from failed
    except ValueError as failed:
        raise error(f"{path}: not usable JSON ({failed}){hint}") from failed
    if not isinstance(document, dict):
        raise error(f"{path}: is a {type(document).__name__}, expected a mapping{hint}")
    return document
