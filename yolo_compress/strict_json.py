"""JSON of others read strictly: a mapping, bounded in bytes and depth, each key once, numbers that a float can hold."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from yolo_compress.errors import CompressError, StorageError

MAX_BYTES = 64 << 20  # a report of 300 classes has 5 MB
MAX_DIGITS = 18  # of a whole number: 64 bits


def load(path: Path, error: type[CompressError]) -> dict[str, Any]:
    """Reads a JSON file whose top level is a mapping.

    Args:
        path: the file.
        error: class raised for a file that is wrong.

    Raises:
        error: too large, not UTF-8, not JSON, nested too deeply, a key twice, NaN, infinity or a number beyond a float's.
        StorageError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as failed:
        raise StorageError(f"{path}: cannot be read: {failed.strerror}") from failed
    if len(data) > MAX_BYTES:
        raise error(f"{path}: larger than {MAX_BYTES >> 20} MiB")
    try:
        found = json.loads(
            data.decode("utf-8-sig"),
            object_pairs_hook=_once,
            parse_constant=_refuse,
            parse_float=_finite,
            parse_int=_whole,
        )
    except (ValueError, RecursionError) as failed:
        what = "nested too deeply" if isinstance(failed, RecursionError) else str(failed)
        raise error(f"{path}: no JSON that can be used ({what})") from failed
    if not isinstance(found, dict):
        raise error(f"{path}: holds a {type(found).__name__}, expected a mapping")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!a} is there twice")
    return found


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is larger than any number here")
    return value


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS + 1:
        raise ValueError(f"a whole number of {len(text)} digits")
    return int(text)
