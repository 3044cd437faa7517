"""NCNN on the CPU. The engine is a graph (.param) and weights (.bin), converted from ONNX by pnnx. Any machine with NCNN opens it."""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import numpy as np

from ..errors import EngineError, RuntimeUnavailable
from ..measure.device import usable_cpus
from .base import census_words, check_channels, check_input, check_output, describe_onnx, problem, resolve, save_info
from .ncnn_convert import CONVOLUTIONS, INSTALL, INT8_SCALES, convert, read_param, require

RUNTIME = "ncnn"
PARAM_FILE, BIN_FILE = "engine.param", "engine.bin"
INPUT, OUTPUT = "in0", "out0"  # names that pnnx gives


def _library() -> Any:
    try:
        import ncnn
    except ImportError as error:
        raise RuntimeUnavailable(f"ncnn does not import ({error})", INSTALL) from error
    return ncnn


def _version() -> str:
    return str(getattr(_library(), "__version__", "unknown"))


class NcnnBackend:
    """Backend for NCNN's CPU layers.

    For fp32 and int8, float layers compute in float32. For fp16 they may store and compute in float16, where the processor can.

    Args:
        path: directory made by `build`.
        threads: threads of one inference; None: one per usable processor.
        precision: the precision that the engine must have; None: any.

    Raises:
        RuntimeUnavailable: the library is missing.
        EngineError: the engine is altered or inconsistent, or the library rejects it.
    """

    def __init__(self, path: Path, threads: Optional[int] = None, precision: Optional[str] = None) -> None:
        ncnn = _library()
        path = Path(path)
        if not path.is_dir():
            raise EngineError(f"{path}: NCNN opens only an engine directory; build one from the ONNX file")
        self.info = resolve(path, RUNTIME, precision, _version(), [PARAM_FILE, BIN_FILE])
        self.names, self.precision, self.imgsz = self.info.names, self.info.precision, self.info.imgsz
        self.needs_nms = self.info.needs_nms
        self.threads = threads or usable_cpus()
        self.batch: Optional[int] = 1
        self._layers = read_param(path / PARAM_FILE)
        self.channels = check_channels(self.info.options.get("channels"), path / PARAM_FILE)
        self._net = ncnn.Net()
        option = self._net.opt
        option.num_threads, option.use_vulkan_compute = self.threads, False
        if self.precision != "fp16":
            option.use_fp16_packed = option.use_fp16_storage = option.use_fp16_arithmetic = False
            option.use_bf16_storage = False
        loaded = (self._net.load_param(str(path / PARAM_FILE)), self._net.load_model(str(path / BIN_FILE)))
        if loaded != (0, 0):
            raise EngineError(f"{path}: NCNN {_version()} rejects {PARAM_FILE} or {BIN_FILE}; build the engine again")
        blank = np.zeros((1, self.channels, *self.imgsz), np.float32)
        check_output(self.info, self(blank).shape, path / PARAM_FILE)

    def __call__(self, images_BCHW: np.ndarray, copy: bool = True) -> np.ndarray:
        return self._infer(_library().Mat(check_input(images_BCHW, self)[0]))

    def _infer(self, image: Any) -> np.ndarray:
        extractor = self._net.create_extractor()
        extractor.input(INPUT, image)
        failed, output = extractor.extract(OUTPUT)
        if failed:
            raise EngineError(f"NCNN could not run the engine (code {failed}); build it again")
        return np.array(output)[None]  # a copy: `output` belongs to the extractor

    def bind(self, images_BCHW: np.ndarray) -> Callable[[], Any]:
        image_CHW = check_input(images_BCHW, self)[0]
        image = _library().Mat(image_CHW)

        def run(_held: np.ndarray = image_CHW) -> None:  # `image` has no copy of it
            self._infer(image)

        return run

    @property
    def executed(self) -> str:
        """Number types of the convolutions as text, from the graph. NCNN does not report its number types."""
        kinds = [
            "int8" if INT8_SCALES in layer.keys else self._float for layer in self._layers if layer.kind in CONVOLUTIONS
        ]
        return census_words(self.precision, {kind: kinds.count(kind) for kind in set(kinds)})

    @property
    def _float(self) -> str:
        supported = getattr(_library(), "cpu_support_arm_asimdhp", lambda: 0)() if self.precision == "fp16" else 0
        return "fp16" if supported else "fp32"

    def node_ms(self, runs: int) -> Dict[str, float]:
        """Return a dict from layer to time in ms: the minimum over `runs` inferences.

        The outputs of all layers are requested from one inference, one after another. Each request computes only the layers that
        are not computed yet.
        """
        image = _library().Mat(np.zeros((self.channels, *self.imgsz), np.float32))
        least: Dict[str, float] = {}
        for _ in range(runs):
            extractor = self._net.create_extractor()
            extractor.set_light_mode(False)  # keeps what later layers read
            extractor.input(INPUT, image)
            for layer in self._layers:
                if not layer.reads:
                    continue
                start = time.perf_counter()
                for blob in layer.writes:
                    extractor.extract(blob)
                spent = (time.perf_counter() - start) * 1e3
                least[layer.name] = min(spent, least.get(layer.name, spent))
        return least

    def __enter__(self) -> "NcnnBackend":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._net.clear()

    @staticmethod
    def form() -> str:
        """Return the kind of INT8 file that this runtime needs. NCNN has no kind of its own: it takes `int8.onnx`."""
        return RUNTIME

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
        """Convert an ONNX file (`ncnn_convert.convert`) into the folder `out`, and test it with one inference. Return the files.

        Raises:
            RuntimeUnavailable: NCNN, pnnx or onnx is missing.
            EngineError: the file cannot be converted, for a reason that `ncnn_convert.convert` lists, or NCNN rejects the result.
        """
        info = describe_onnx(Path(onnx), RUNTIME, precision, _version(), names, imgsz)
        with tempfile.TemporaryDirectory() as scratch:
            param, weights, channels = convert(Path(onnx), Path(scratch), info.imgsz, precision)
            out.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(param, out / PARAM_FILE)
            shutil.copyfile(weights, out / BIN_FILE)
        info = replace(info, options={"channels": channels})
        save_info(info, out, [PARAM_FILE, BIN_FILE])
        with NcnnBackend(out):  # runs one inference
            pass
        return {name: out / name for name in (PARAM_FILE, BIN_FILE, "engine.json")}
