"""Make a YOLOv8 detector small and fast for a robot, and prove what that cost.

    from yolo_compress import load, run
    artifact = run(load("bccd"), "report")

Importing this package imports neither torch nor ultralytics.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yolo_compress.artifact import Artifact
    from yolo_compress.pipeline import run
    from yolo_compress.recipe import Recipe, load

__version__ = "0.1.0"
__all__ = ["Artifact", "Recipe", "__version__", "load", "run"]
_HOME = {"Artifact": "artifact", "Recipe": "recipe", "load": "recipe", "run": "pipeline"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"yolo_compress.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
