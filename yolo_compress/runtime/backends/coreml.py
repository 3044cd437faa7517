"""CoreML on a Mac. The engine is an ML program and its weights, converted from ONNX. It has never run: there was no Mac.

Conversion works on any system (`coreml_convert`), and `export.coreml=true` writes `.mlpackage` files for phones and Macs.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import numpy as np

from ..errors import EngineError, RuntimeUnavailable
from .base import (
    EngineInfo,
    census_words,
    check_channels,
    check_input,
    check_output,
    describe_onnx,
    problem,
    resolve,
    save_info,
)
from .coreml_convert import census, content, convert, library, package, require
from .coreml_program import INPUT, OUTPUT

RUNTIME = "coreml"
CONFIDENCE, COORDINATES = "confidence", "coordinates"  # outputs of a package with NMS
THRESHOLDS = ("iouThreshold", "confidenceThreshold")  # its inputs, each with a default
EVALUATION = (0.7, 0.001)  # IoU, score
MODEL_FILE, WEIGHT_FILE = "engine.mlmodel", "weight.bin"


def _library() -> Any:
    if sys.platform != "darwin":
        raise RuntimeUnavailable(
            "CoreML runs on macOS alone", "on another system, export.coreml=true writes .mlpackage files"
        )
    return library()


class CoreMLBackend:
    """Backend for CoreML, which chooses between CPU, GPU and Neural Engine itself.

    Args:
        path: directory made by `build`.
        precision: the precision that the engine must have; None: any.

    Raises:
        RuntimeUnavailable: this is no Mac, or coremltools is missing.
        EngineError: the engine is altered or inconsistent, or CoreML rejects it.
    """

    def __init__(self, path: Path, precision: Optional[str] = None) -> None:
        coremltools, path = _library(), Path(path)
        if not path.is_dir():
            raise EngineError(f"{path}: CoreML opens only an engine directory; build one from the ONNX file")
        info = resolve(path, RUNTIME, precision, coremltools.__version__, [MODEL_FILE, WEIGHT_FILE])
        self._scratch = tempfile.TemporaryDirectory()
        stored = [(path / name).read_bytes() for name in (MODEL_FILE, WEIGHT_FILE)]
        self._open(package(stored[0], stored[1], Path(self._scratch.name, "engine.mlpackage")), info)

    @classmethod
    def of_package(cls, folder: Path, info: EngineInfo) -> "CoreMLBackend":
        """Open a `.mlpackage` that `export` wrote, with or without NMS. Its files are not checked.

        With NMS, the output has only the boxes that NMS left.

        Args:
            info: description of the package. Its option `channels` is the number of image channels.
        """
        self = cls.__new__(cls)
        self._scratch = tempfile.TemporaryDirectory()
        copied = Path(self._scratch.name, folder.name)
        shutil.copytree(str(folder), str(copied))  # coremltools writes into a package that it opens
        self._open(copied, info)
        return self

    def _open(self, folder: Path, info: EngineInfo) -> None:
        coremltools = _library()
        self.info = info
        self.names, self.precision, self.imgsz, self.needs_nms = info.names, info.precision, info.imgsz, info.needs_nms
        self.threads: Optional[int] = None
        self.channels = check_channels(info.options.get("channels"), folder)
        self._model = coremltools.models.MLModel(str(folder), compute_units=coremltools.ComputeUnit.ALL)
        spec = self._model.get_spec()
        self._has_nms = bool(spec.HasField("pipeline"))
        program = spec.pipeline.models[0] if self._has_nms else spec
        self.batch: Optional[int] = 1 if self._has_nms else program.description.input[0].type.multiArrayType.shape[0]
        self._census = census(program, folder / "Data" / "com.apple.CoreML" / "weights")
        blank = np.zeros((self.batch or 1, self.channels, *self.imgsz), np.float32)
        check_output(info, self(blank).shape, folder)

    def __call__(self, images_BCHW: np.ndarray, copy: bool = True) -> np.ndarray:
        made = self._model.predict(self._values(images_BCHW))
        if not self._has_nms:
            return np.asarray(made[OUTPUT], np.float32)
        sides = [self.imgsz[1], self.imgsz[0]] * 2
        boxes_N4 = np.asarray(made[COORDINATES], np.float32).reshape(-1, 4) * np.array(sides, np.float32)
        scores_NC = np.asarray(made[CONFIDENCE], np.float32).reshape(-1, len(self.names))
        return np.concatenate([boxes_N4, scores_NC], 1).T[None]

    def bind(self, images_BCHW: np.ndarray) -> Callable[[], Any]:
        values = self._values(images_BCHW)
        return lambda: self._model.predict(values)

    def _values(self, images_BCHW: np.ndarray) -> Dict[str, Any]:
        """Return the values of the inputs. With NMS they are the pixels of an image, and the thresholds of an evaluation."""
        images_BCHW = check_input(images_BCHW, self)
        if not self._has_nms:
            return {INPUT: images_BCHW}
        from PIL import Image

        pixels_HWC = np.rint(images_BCHW[0].transpose(1, 2, 0) * 255).astype(np.uint8)
        image = Image.fromarray(pixels_HWC[..., 0] if self.channels == 1 else pixels_HWC)
        return {INPUT: image, **dict(zip(THRESHOLDS, EVALUATION))}

    @property
    def executed(self) -> str:
        """Number types of the convolutions as text, as stored. CoreML does not report what it executes."""
        quantised = len(self._census.weights)
        others = "fp32" if self.precision == "fp32" else "fp16"
        counts = {"int8": quantised, others: self._census.layers["conv"] - quantised}
        return census_words(self.precision, {kind: count for kind, count in counts.items() if count}) + ", as stored"

    def node_ms(self, runs: int) -> Dict[str, float]:
        """Raise EngineError: CoreML does not report the time of a layer."""
        raise EngineError("CoreML does not report the time of a layer; name another runtime")

    def __enter__(self) -> "CoreMLBackend":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._scratch.cleanup()

    @staticmethod
    def form() -> str:
        """Return the kind of INT8 file that this runtime needs: float16 between the Q/DQ pairs, and scales exact in float16."""
        return "tensorrt11"

    @staticmethod
    def probe() -> Optional[str]:
        """Return a text that says what to install. None: engines can be built here."""
        return problem(_library) or problem(require)

    @staticmethod
    def build(
        onnx: Path,
        out: Path,
        precision: str,
        names: Optional[Sequence[str]] = None,
        imgsz: Optional[Tuple[int, int]] = None,
    ) -> Dict[str, Path]:
        """Convert an ONNX file (`coreml_convert.convert`) into the folder `out`, and test it with one inference. Return the files.

        Raises:
            RuntimeUnavailable: this is no Mac, or coremltools or onnx is missing.
            EngineError: the file cannot be converted, for a reason that `coreml_convert.convert` lists, or CoreML rejects the result.
        """
        info = describe_onnx(Path(onnx), RUNTIME, precision, _library().__version__, names, imgsz)
        spec, weights = content(convert(Path(onnx), info.imgsz, precision), {})
        out.mkdir(parents=True, exist_ok=True)
        (out / MODEL_FILE).write_bytes(spec.SerializeToString(deterministic=True))
        (out / WEIGHT_FILE).write_bytes(weights)
        channels = spec.description.input[0].type.multiArrayType.shape[1]
        save_info(replace(info, options={"channels": channels}), out, [MODEL_FILE, WEIGHT_FILE])
        with CoreMLBackend(out):  # runs one inference
            pass
        return {name: out / name for name in (MODEL_FILE, WEIGHT_FILE, "engine.json")}
