"""How a figure is written; a figure that does not exist is a dash, never 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from yolo_compress.runtime.registry import titles

DASH = "\u2013"
MODELS = {"original": "baseline", "compressed": "compressed"}  # as JSON has them -> as people read them
RUNTIMES = {
    "torch": "PyTorch",
    **titles(),
    "torchscript": "TorchScript",
    "onnx": "ONNX",
}


def finite(value: Any) -> float | None:
    """The value as a float, or None where it is absent, not a number or infinite."""
    if value is None or isinstance(value, (bool, str, list, dict)):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def fixed(value: Any, digits: int = 3) -> str:
    """A fraction such as mAP."""
    number = finite(value)
    return DASH if number is None else f"{number:.{digits}f}"


def signed(value: Any, digits: int = 3) -> str:
    """A difference, its sign always written."""
    number = finite(value)
    return DASH if number is None else f"{round(number, digits) or 0.0:+.{digits}f}"  # never -0.000


def interval(low: Any, high: Any, write: Callable[[Any], str]) -> str:
    """Both ends, or a dash where there is no interval."""
    return DASH if finite(low) is None or finite(high) is None else f"{write(low)} to {write(high)}"


def three(value: Any) -> str:
    """Three significant digits without exponent: ms, MiB, GFLOPs."""
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
    """Both as per cent, with as many digits as it takes to see that they differ (a gate missed by 1e-9 says so)."""
    for digits in range(1, 13):
        texts = percent(value, digits), percent(bound, digits)
        if texts[0] != texts[1] or value == bound:
            return texts
    return texts


def times(value: Any) -> str:
    """A ratio; `x` stands for the multiplication sign so that any terminal shows it."""
    number = finite(value)
    return DASH if number is None else f"{number:.2f}x" if number < 1 else f"{number:.1f}x"


def millions(value: Any) -> str:
    """A count of parameters."""
    number = finite(value)
    return DASH if number is None else f"{number / 1e6:.2f} M"


def whole(value: Any) -> str:
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
    """A model of a bench row as people read it."""
    return MODELS.get(name, name)


def runtime(name: str) -> str:
    """A runtime as people read it."""
    return RUNTIMES.get(name, name)


def plain(value: Any) -> str:
    """As many digits as it was given with."""
    number = finite(value)
    return DASH if number is None else f"{number:.4g}"


def change(before: Any, after: Any, write: Callable[[Any], str]) -> str:
    """A difference in the form of its figures, its sign always written."""
    low, high = finite(before), finite(after)
    if low is None or high is None:
        return DASH
    return ("-" if high < low else "+") + write(abs(high - low))


def probability(value: Any) -> str:
    number = finite(value)
    return DASH if number is None else "under 0.001" if number < 0.001 else f"{number:.3f}"


def one_line(key: str, value: Any) -> Any:
    """A value of the environment on one line: mappings and lists are spelled out."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {one_line(name, item)}" for name, item in value.items())
    if isinstance(value, list):
        return (" x " if key.startswith("imgsz") else ", ").join(map(str, value))
    return value
