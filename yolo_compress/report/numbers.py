"""Format numbers for the report. A missing number is a dash, never 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from yolo_compress.runtime.registry import titles

DASH = "\u2013"
MODELS = {"original": "baseline", "compressed": "compressed"}  # name in JSON -> name in the report
RUNTIMES = {
    "torch": "PyTorch",
    **titles(),
    "torchscript": "TorchScript",
    "onnx": "ONNX",
}


def finite(value: Any) -> float | None:
    """Return the value as a float, or None if it is absent, NaN, infinite or not a number."""
    if value is None or isinstance(value, (bool, str, list, dict)):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def fixed(value: Any, digits: int = 3) -> str:
    """Format a number, such as mAP, with `digits` decimals."""
    number = finite(value)
    return DASH if number is None else f"{number:.{digits}f}"


def signed(value: Any, digits: int = 3) -> str:
    """Format a difference with its sign and `digits` decimals."""
    number = finite(value)
    return DASH if number is None else f"{round(number, digits) or 0.0:+.{digits}f}"  # never -0.000


def interval(low: Any, high: Any, write: Callable[[Any], str]) -> str:
    """Format an interval. `write` formats each end. If an end is missing, return a dash."""
    return DASH if finite(low) is None or finite(high) is None else f"{write(low)} to {write(high)}"


def three_digits(value: Any) -> str:
    """Format ms, MiB or GFLOPs with three significant digits, without exponent."""
    number = finite(value)
    if number is None:
        return DASH
    if number == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(number))))
    return f"{number:,.{min(digits, 4)}f}"


def percent(value: Any, digits: int = 1) -> str:
    number = finite(value)
    return DASH if number is None else f"{100 * number:.{digits}f} %"


def percent_apart(value: float, bound: float) -> tuple[str, str]:
    """Format `value` and `bound` as per cent, with enough decimals to show that they differ, even by 1e-9."""
    for digits in range(1, 13):
        texts = percent(value, digits), percent(bound, digits)
        if texts[0] != texts[1] or value == bound:
            return texts
    return texts


def times(value: Any) -> str:
    """Format a ratio, such as `2.4x`, with the letter x: not every terminal can show a multiplication sign."""
    number = finite(value)
    return DASH if number is None else f"{number:.2f}x" if number < 1 else f"{number:.1f}x"


def millions(value: Any) -> str:
    """Format a count of parameters in millions."""
    number = finite(value)
    return DASH if number is None else f"{number / 1e6:.2f} M"


def integer(value: Any) -> str:
    number = finite(value)
    return DASH if number is None else f"{number:,.0f}"


def duration(value: Any) -> str:
    number = finite(value)
    if number is None:
        return DASH
    if number < 60:
        return f"{number:.0f} s" if number >= 10 else f"{number:.1f} s"
    minutes, seconds = divmod(round(number), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def model(name: str) -> str:
    """Return a model's name in the report for its name in JSON, such as "baseline" for "original"."""
    return MODELS.get(name, name)


def runtime(name: str) -> str:
    """Return a runtime's name in the report for its name in JSON, such as "openvino"."""
    return RUNTIMES.get(name, name)


def four_digits(value: Any) -> str:
    """Format a number with at most four significant digits, such as a threshold."""
    number = finite(value)
    return DASH if number is None else f"{number:.4g}"


def change(before: Any, after: Any, write: Callable[[Any], str]) -> str:
    """Format the change from `before` to `after` with its sign; `write` formats its absolute value."""
    low, high = finite(before), finite(after)
    if low is None or high is None:
        return DASH
    return ("-" if high < low else "+") + write(abs(high - low))


def probability(value: Any) -> str:
    number = finite(value)
    return DASH if number is None else "under 0.001" if number < 0.001 else f"{number:.3f}"


def one_line(key: str, value: Any) -> Any:
    """Return a value of the environment for one line of text. Mappings and lists become text."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {one_line(name, item)}" for name, item in value.items())
    if isinstance(value, list):
        return (" x " if key.startswith("imgsz") else ", ").join(map(str, value))
    return value
