"""Tables of the pruning criteria and of the feature losses. Also loads a user's own function (`file.py:function`).

To add a criterion or a loss, write the function and add a row here. Recipe, help and stages read these tables. torch is imported
only when `find` loads a function.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import traceback
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from yolo_compress.errors import RecipeError


class Choice(NamedTuple):
    """One allowed value of a knob, such as a pruning criterion, and the function that implements it.

    Attributes:
        where: "module:name" of the function.
        text: Explanation in the help. Neighbouring rows with equal texts share one sentence.
    """

    where: str
    text: str


CRITERIA: dict[str, Choice] = {
    "obs": Choice(
        "yolo_compress.prune.obs:obs",
        "output error of the next layers after the remaining channels are refitted (Optimal Brain Surgeon)",
    ),
    "bn_gamma": Choice("yolo_compress.prune.criteria:bn_gamma", "mean |gamma| of the channel's BatchNorms"),
    "l1": Choice("yolo_compress.prune.criteria:l1", "computed from the weights"),
    "l2": Choice("yolo_compress.prune.criteria:l2", "computed from the weights"),
    "fpgm": Choice("yolo_compress.prune.criteria:fpgm", "computed from the weights"),
    "lamp": Choice("yolo_compress.prune.criteria:lamp", "computed from the weights"),
    "taylor": Choice("yolo_compress.prune.criteria:taylor", "estimated change of the loss"),
    "hessian": Choice("yolo_compress.prune.criteria:hessian", "estimated change of the loss"),
    "activation": Choice("yolo_compress.prune.criteria:activation", "standard deviation of the activations"),
    "random": Choice("yolo_compress.prune.criteria:random", "random numbers, for comparison"),
}
FEATURE_LOSSES: dict[str, Choice] = {
    "weighted_l2": Choice(
        "yolo_compress.distill.feature:weighted_l2", "L2 weighted by the teacher's scores, as in Ultralytics"
    ),
    "fitnet": Choice("yolo_compress.distill.feature:l2", "L2 (arXiv 1412.6550)"),
    "cwd": Choice(
        "yolo_compress.distill.feature:channel_wise", "softmax of each channel over the locations (arXiv 2011.13256)"
    ),
    "pkd": Choice("yolo_compress.distill.feature:pearson", "Pearson correlation (arXiv 2207.02039)"),
    "mgd": Choice("yolo_compress.distill.feature:MGD", "reconstruction of masked maps (arXiv 2205.01529)"),
    "attention": Choice("yolo_compress.distill.feature:ATTENTION", "attention maps (arXiv 1612.03928)"),
    "relation": Choice("yolo_compress.distill.feature:RELATION", "Gram matrix over a batch (arXiv 1907.09682)"),
}
OWN = ("criterion", "feature_loss")  # knobs that also take file.py:function


def described(rows: Mapping[str, Choice]) -> str:
    """Return the sentences of the help: `obs: output error of .... l1, l2: computed from the weights. ...`"""
    shared = groupby(rows.items(), key=lambda row: row[1].text)
    parts = [f"{', '.join(name for name, _ in group)}: {text}." for text, group in shared]
    return " ".join([*parts, "file.py:function: a function of your own."])


def allowed(rows: Mapping[str, Choice]) -> str:
    """Return the allowed values of the knob: `one of obs, bn_gamma, ..., or file.py:function`."""
    return f"one of {', '.join(rows)}, or file.py:function"


def is_own(value: str) -> bool:
    """Return whether a value names a function in a file of the user."""
    return ":" in value


def find(rows: Mapping[str, Choice], value: str, knob: str) -> Any:
    """Import and return the function, or other object, that the value of a knob names.

    Args:
        rows: `CRITERIA` or `FEATURE_LOSSES`.
        value: A key of `rows`, or `file.py:function`.
        knob: Name of the knob for error messages, such as "prune.criterion".

    Raises:
        RecipeError: The name, file or function does not exist, or the file cannot be imported. The message gives the line.
    """
    if value in rows:
        module, _, name = rows[value].where.partition(":")
        return getattr(importlib.import_module(module), name)
    path, _, name = value.rpartition(":")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path) if path.endswith(".py") else None
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise RecipeError(f"{knob}: no file {path!r}; write a function of your own as file.py:function")
    own = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(own)
    except Exception as error:  # whatever the user's file raises
        raise RecipeError(f"{knob}: {path} cannot be imported: {blame(error, path)}") from error
    if not hasattr(own, name):
        raise RecipeError(f"{knob}: {path} has no function {name!r}")
    return getattr(own, name)


def check_signature(function: Any, parameters: Sequence[str], value: str, knob: str) -> None:
    """Check that a function can be called with these positional arguments.

    Raises:
        RecipeError: `function` is not callable, or takes other arguments.
    """
    if not callable(function):
        raise RecipeError(f"{knob}: {value} is a {type(function).__name__}, expected a function")
    signature = inspect.signature(function)
    try:
        signature.bind(*parameters)
    except TypeError:
        expected = f"({', '.join(parameters)})"
        raise RecipeError(f"{knob}: {value} takes {signature}, expected a function of {expected}") from None


def blame(error: BaseException, path: str) -> str:
    """Return text for an error in a user's file: its type and first line, and the line of the file where it was raised.

    Args:
        error: Exception that code in the user's file raised.
        path: The user's file.
    """
    line = error.lineno if isinstance(error, SyntaxError) else None
    for frame in traceback.extract_tb(error.__traceback__):
        if Path(frame.filename).name == Path(path).name:
            line = frame.lineno
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" + (f" (line {line})" if line else "")
