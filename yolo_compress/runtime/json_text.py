"""JSON read strictly: each key once, a depth that Python can follow, and numbers that a float can hold."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

MAX_BYTES = 64 << 20  # a report of 300 classes has 5 MB
MAX_DIGITS = 18  # of a whole number: 64 bits


def refuse(word: str) -> Any:
    """NaN and infinity are no JSON."""
    raise ValueError(f"{word} is no number")


def parse(data: bytes, constant: Callable[[str], Any] = refuse) -> Any:
    """The document.

    Args:
        constant: gives what NaN, Infinity and -Infinity stand for; refuses them by default.

    Raises:
        ValueError: too large, not UTF-8, not JSON, nested too deeply, a key twice, or a number beyond a float's.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES >> 20} MiB")
    try:
        return json.loads(
            data.decode("utf-8-sig"),
            object_pairs_hook=_once,
            parse_constant=constant,
            parse_float=_finite,
            parse_int=_whole,
        )
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read(path: Path, constant: Callable[[str], Any] = refuse) -> Any:
    """The document of a file; of a larger one, no more than that it is too large.

    Raises:
        ValueError: as `parse`.
        OSError: it cannot be read.
    """
    return parse(content(path), constant)


def content(path: Path) -> bytes:
    """The bytes of a file; of one that is too large, as many as `parse` refuses.

    Raises:
        OSError: it cannot be read.
    """
    with open(str(path), "rb") as file:
        return file.read(MAX_BYTES + 1)


def _once(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError("key {!a} is there twice".format(next(key for key in keys if keys.count(key) > 1)))
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is larger than any number here")
    return value


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS + 1:
        raise ValueError(f"a whole number of {len(text)} digits")
    return int(text)
