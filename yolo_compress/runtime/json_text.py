"""Strict JSON parser: it refuses duplicate keys, deep nesting, and numbers that a float cannot hold."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

MAX_BYTES = 64 << 20  # a report of 300 classes has 5 MB
MAX_DIGITS = 18  # digits of a whole number, which then fits in 64 bits


def refuse(word: str) -> Any:
    """Raise ValueError for NaN and infinity, which are not JSON."""
    raise ValueError(f"{word} is no number")


def parse(data: bytes, constant: Callable[[str], Any] = refuse) -> Any:
    """Parse a JSON document.

    Args:
        constant: function that converts NaN, Infinity and -Infinity. By default they are refused.

    Raises:
        ValueError: the data is too large, not UTF-8, not JSON, nested too deeply, has a duplicate key or too large a number.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES >> 20} MiB")
    try:
        return json.loads(
            data.decode("utf-8-sig"),
            object_pairs_hook=_unique_keys,
            parse_constant=constant,
            parse_float=_finite,
            parse_int=_whole,
        )
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read(path: Path, constant: Callable[[str], Any] = refuse) -> Any:
    """Parse the JSON document in a file.

    Raises:
        ValueError: `parse` refuses the document.
        OSError: the file cannot be read.
    """
    return parse(content(path), constant)


def content(path: Path) -> bytes:
    """Read the bytes of a file. If the file is too large for `parse`, only one byte more than the limit is read.

    Raises:
        OSError: the file cannot be read.
    """
    with open(str(path), "rb") as file:
        return file.read(MAX_BYTES + 1)


def _unique_keys(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError("key {!a} is there twice".format(next(key for key in keys if keys.count(key) > 1)))
    return document


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is larger than any number here")
    return value


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS + 1:
        raise ValueError(f"a whole number of {len(text)} digits")
    return int(text)
