"""LiteRT (TensorFlow Lite) on the CPU, with XNNPACK. The engine is a `.tflite` file, which phones, boards and browsers run, too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import numpy as np

from ..errors import EngineError, RuntimeUnavailable
from ..measure.device import usable_cpus
from ..registry import INT8_IMAGES
from .base import census_words, check_channels, check_input, check_output, describe_onnx, problem, resolve, save_info
from .litert_convert import convert, require
from .litert_file import FLOAT32, INSTALL, INT8, Quantised, read

RUNTIME = "litert"
FILE = "engine.tflite"
CONVOLUTIONS = ("CONV_2D", "DEPTHWISE_CONV_2D")


def _library() -> Any:
    try:
        import ai_edge_litert
        import ai_edge_litert.interpreter
    except ImportError as error:
        raise RuntimeUnavailable(f"ai-edge-litert does not import ({error})", INSTALL) from error
    return ai_edge_litert


class LiteRtBackend:
    """Backend for LiteRT's CPU operators.

    Float operators compute in float32. For fp16 the weights are stored as float16. For int8, what the plan leaves in float and the box
    decode are float32. If the file takes INT8 images, they are quantised here with the scale of its input.

    Args:
        path: directory made by `build`.
        threads: threads of one inference; None: one per usable processor.
        precision: the precision that the engine must have; None: any.

    Raises:
        RuntimeUnavailable: the library is missing.
        EngineError: the engine is altered or inconsistent, or the library rejects it.
    """

    def __init__(self, path: Path, threads: Optional[int] = None, precision: Optional[str] = None) -> None:
        library, path = _library(), Path(path)
        if not path.is_dir():
            raise EngineError(f"{path}: LiteRT opens only an engine directory; build one from the ONNX file")
        self.info = resolve(path, RUNTIME, precision, library.__version__, [FILE])
        self.names, self.precision, self.imgsz = self.info.names, self.info.precision, self.info.imgsz
        self.needs_nms = self.info.needs_nms
        self.threads = threads or usable_cpus()
        self.channels = check_channels(self.info.options.get("channels"), path / FILE)
        self._kinds = _census(path / FILE)
        try:
            self._engine = library.interpreter.Interpreter(str(path / FILE), num_threads=self.threads)
            self._engine.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise EngineError(
                f"{path}: LiteRT {library.__version__} rejects {FILE} ({error}); build it again"
            ) from error
        taken, given = self._engine.get_input_details()[0], self._engine.get_output_details()[0]
        self._input, self._output = taken["index"], given["index"]
        scale, zero_point = taken["quantization"]
        int8_images = taken["dtype"] is np.int8
        self._images: Optional[Quantised] = (
            Quantised(np.array([scale], np.float32), zero_point) if int8_images else None
        )
        self.batch: Optional[int] = int(taken["shape"][0])
        check_output(self.info, given["shape"].tolist(), path / FILE)

    def __call__(self, images_BCHW: np.ndarray, copy: bool = True) -> np.ndarray:
        self.bind(images_BCHW)()
        output: np.ndarray = self._engine.get_tensor(self._output)
        return output

    def bind(self, images_BCHW: np.ndarray) -> Callable[[], Any]:
        images_BHWC = np.ascontiguousarray(check_input(images_BCHW, self).transpose(0, 2, 3, 1))
        if self._images is not None:
            values_BHWC = np.rint(images_BHWC / self._images.scale) + self._images.zero_point
            images_BHWC = values_BHWC.clip(-128, 127).astype(np.int8)

        def run() -> None:
            self._engine.set_tensor(self._input, images_BHWC)
            self._engine.invoke()

        return run

    @property
    def executed(self) -> str:
        """Number types of the convolutions, and of INT8 images, as text, from the file."""
        return census_words(self.precision, self._kinds) + ("" if self._images is None else ", INT8 images")

    def node_ms(self, runs: int) -> Dict[str, float]:
        """Raise EngineError: LiteRT's Python library does not report the time of an operator."""
        raise EngineError("LiteRT does not report the time of a layer; name another runtime")

    def __enter__(self) -> "LiteRtBackend":
        return self

    def __exit__(self, *exception: Any) -> None:
        del self._engine

    @staticmethod
    def form() -> str:
        """Return the kind of INT8 file that this runtime needs: the outputs of convolutions are quantised, too."""
        return "onnxruntime"

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
        int8_images: bool = False,
    ) -> Dict[str, Path]:
        """Convert an ONNX file (`litert_convert.convert`) into the folder `out`, and test it with one inference. Return the files.

        Args:
            int8_images: whether the file takes INT8 images. Only for int8.

        Raises:
            RuntimeUnavailable: LiteRT or onnx is missing.
            EngineError: the file cannot be converted, for a reason that `litert_convert.convert` lists, or LiteRT rejects the result.
        """
        info = describe_onnx(Path(onnx), RUNTIME, precision, _library().__version__, names, imgsz)
        out.mkdir(parents=True, exist_ok=True)
        channels = convert(Path(onnx), out / FILE, info.imgsz, precision, int8_images)
        save_info(replace(info, options={"channels": channels, INT8_IMAGES: int8_images}), out, [FILE])
        with LiteRtBackend(out) as made:
            made(np.zeros((made.batch or 1, channels, *info.imgsz), np.float32))
        return {name: out / name for name in (FILE, "engine.json")}


def _census(file: Path) -> Dict[str, int]:
    """Return the number of convolutions by number type."""
    found: Dict[str, int] = {}
    for operator in read(file):
        if operator.kind in CONVOLUTIONS:
            kind = {INT8: "int8", FLOAT32: "fp32"}[operator.outputs[0].kind]
            found[kind] = found.get(kind, 0) + 1
    return found
