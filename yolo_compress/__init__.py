"""Make a YOLOv8, YOLO11 or YOLO26 detector small and fast for a robot, and measure the cost in mAP and latency.

    from yolo_compress import Detector, load, open_engine, run

    artifact = run(load("digits", [("prune.keep_flops", "0.6")]), "report")  # runs up to `report`; reuses finished stages
    print(artifact.metrics["verdict"]["line"], artifact.file("report.html"))

    with open_engine("weights/digits/engine/compressed/onnxruntime-int8") as engine:
        detections_N6 = Detector(engine, conf=0.25, multi_label=False)(image_HW3)

`image_HW3` is an (H, W, 3) uint8 RGB array. `detections_N6` is an (N, 6) array with the columns x1, y1, x2, y2 in px, score, class.

Errors that a user can fix are subclasses of `errors.CompressError`. Errors of an engine are `runtime.errors.RuntimeFailure`.
Importing this package is fast: a module such as torch is imported only when a name that needs it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from yolo_compress.pipeline import run
    from yolo_compress.recipe.recipe import Recipe, load
    from yolo_compress.runtime.detect.detector import Detector
    from yolo_compress.runtime.engine import open_engine
    from yolo_compress.store.manifest import Artifact

__version__ = "0.1.0"
__all__ = ["Artifact", "Detector", "Recipe", "__version__", "load", "open_engine", "run"]
_MODULES = {
    "Artifact": "store.manifest",
    "Detector": "runtime.detect.detector",
    "Recipe": "recipe.recipe",
    "load": "recipe.recipe",
    "open_engine": "runtime.engine",
    "run": "pipeline",
}

if not TYPE_CHECKING:  # otherwise a type checker would accept every attribute name of this package

    def __getattr__(name: str) -> object:
        if name in _MODULES:
            return getattr(import_module(f"yolo_compress.{_MODULES[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
