"""OpenVINO on the CPU. The engine is an IR (.xml + .bin) that is compiled for the machine when it is opened."""

from __future__ import annotations

import errno
import threading
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np

from ..errors import EngineError, RuntimeUnavailable
from ..measure.device import usable_cpus
from .base import census_words, check_channels, check_input, check_output, describe_onnx, problem, resolve, save_info

RUNTIME = "openvino"
ENGINE_FILE = "engine.xml"
WEIGHTS_FILE = "engine.bin"
_TYPES = threading.Lock()
_ARITHMETIC = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "i8": "int8", "u8": "int8"}


def _library() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise RuntimeUnavailable(f"openvino does not import ({error})", "pip install openvino") from error
    # The first tensor of a process initialises types. Two threads that create it at the same time deadlock (2026.4).
    with _TYPES:
        _ = openvino.Tensor(np.zeros(1, np.float32), shared_memory=True).data
    return openvino


class OpenVINOBackend:
    """Backend for OpenVINO's CPU plugin, tuned for latency.

    For fp32 and int8, INFERENCE_PRECISION_HINT is f32. Otherwise the plugin runs float layers in bf16 on processors that support
    bf16, and boxes move by a pixel. For fp16, the plugin chooses bf16, f16 or f32; `executed` states the choice.

    Args:
        path: directory made by `build`, or an ONNX file with Ultralytics' metadata.
        threads: threads of one inference. None: one per usable processor.
        precision: for a directory, the required precision (None: any). For an ONNX file, the precision of the file (None: fp32).

    Raises:
        RuntimeUnavailable: the library is missing.
        EngineError: the engine is altered or inconsistent, or the library rejects it.
    """

    def __init__(self, path: Path, threads: Optional[int] = None, precision: Optional[str] = None) -> None:
        ov = _library()
        path = Path(path)
        self.info = resolve(path, RUNTIME, precision, ov.__version__, [ENGINE_FILE, WEIGHTS_FILE])
        self._file = path / ENGINE_FILE if path.is_dir() else path
        self.names, self.precision, self.imgsz = self.info.names, self.info.precision, self.info.imgsz
        self.needs_nms = self.info.needs_nms
        self.threads = threads or usable_cpus()
        self._compiled = self._compile()
        self._request = self._compiled.create_infer_request()
        self._executed: Optional[str] = None
        shape = self._compiled.input(0).get_partial_shape()
        self.batch: Optional[int] = None if shape[0].is_dynamic else shape[0].get_length()
        channels, *takes = [-1 if d.is_dynamic else d.get_length() for d in shape][1:]
        self.channels = check_channels(channels, self._file)
        if any(size not in (-1, wanted) for size, wanted in zip(takes, self.imgsz)):
            raise EngineError(f"{self._file}: takes {list(takes)} px, its metadata says {self.imgsz}; export again")
        output = self._compiled.output(0).get_partial_shape()
        check_output(self.info, [-1 if d.is_dynamic else d.get_length() for d in output], self._file)

    def _compile(self, **extra: str) -> Any:
        ov = _library()
        config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": self.threads, **extra}
        if self.threads < usable_cpus():
            config["ENABLE_CPU_PINNING"] = "NO"  # else every engine of one thread runs on processor 0 (2026.4)
        if self.info.precision != "fp16":
            config["INFERENCE_PRECISION_HINT"] = "f32"
        try:
            core = ov.Core()
            return core.compile_model(core.read_model(str(self._file)), "CPU", config)
        except RuntimeError as error:
            raise EngineError(f"{self._file}: OpenVINO {ov.__version__} rejects it: {error}") from error

    def __call__(self, images_BCHW: np.ndarray, copy: bool = True) -> np.ndarray:
        images_BCHW = check_input(images_BCHW, self)
        self._request.infer([images_BCHW], share_inputs=True, share_outputs=True)
        output = self._request.get_output_tensor(0).data
        return np.array(output, np.float32) if copy else np.asarray(output, np.float32)

    def bind(self, images_BCHW: np.ndarray) -> Callable[[], Any]:
        images_BCHW = check_input(images_BCHW, self)
        request = self._compiled.create_infer_request()  # a separate one, because a request holds its last input tensor
        request.set_input_tensor(_library().Tensor(images_BCHW, shared_memory=True))

        def run(_held: np.ndarray = images_BCHW) -> None:
            request.infer(share_outputs=True)  # else each call copies the output

        return run

    @property
    def executed(self) -> str:
        """Number types of the convolutions as text, from `runtimePrecision` in the compiled graph."""
        if self._executed is None:
            counts: Counter = Counter()
            for operation in self._compiled.get_runtime_model().get_ops():
                info = operation.get_rt_info()
                if info["layerType"].get() == "Convolution":
                    kind = str(info["runtimePrecision"].get())
                    counts[_ARITHMETIC.get(kind, kind)] += 1
            words = census_words(self.precision, dict(counts))
            if self.precision == "fp16" and set(counts) == {"fp32"}:
                words = "fp32 (fp16 weights)"
            self._executed = words
        return self._executed

    def node_ms(self, runs: int) -> Dict[str, float]:
        """Return a dict from node name in the compiled graph to time in ms: the minimum over `runs` inferences."""
        request = self._compile(PERF_COUNT="YES").create_infer_request()
        blank = np.zeros((self.batch or 1, self.channels) + self.imgsz, np.float32)
        samples: Dict[str, List[float]] = {}
        for _ in range(runs):
            request.infer([blank])
            for node in request.profiling_info:
                samples.setdefault(node.node_name, []).append(node.real_time.total_seconds() * 1e3)
        return {name: min(values) for name, values in samples.items()}

    def __enter__(self) -> "OpenVINOBackend":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._request = self._compiled = None

    @staticmethod
    def form() -> str:
        """Return the kind of INT8 file that this runtime needs: the `form` of a `registry.Int8File`."""
        return "openvino"

    @staticmethod
    def probe() -> Optional[str]:
        """Return a text that says what to install. None: this runtime works."""
        return problem(_library)

    @staticmethod
    def build(
        onnx: Path,
        out: Path,
        precision: str,
        names: Optional[Sequence[str]] = None,
        imgsz: Optional[Tuple[int, int]] = None,
    ) -> Dict[str, Path]:
        """Convert an ONNX file to OpenVINO's IR in the folder `out`. Return the written files by name.

        `onnx` must have been exported for `precision`. Weights are stored as float16 only for fp16.

        Raises:
            EngineError: OpenVINO cannot read the graph, or the precision is int8 and the graph has no quantisation.
            OSError: the IR could not be written completely.
        """
        ov = _library()
        info = describe_onnx(Path(onnx), RUNTIME, precision, ov.__version__, names, imgsz)
        out.mkdir(parents=True, exist_ok=True)
        try:
            model = ov.Core().read_model(str(onnx))
        except RuntimeError as error:
            raise EngineError(f"{onnx}: OpenVINO {ov.__version__} cannot read it: {error}") from error
        if precision == "int8" and not any(op.get_type_name() == "FakeQuantize" for op in model.get_ops()):
            raise EngineError(f"{onnx}: int8 requested, but the graph has no Q/DQ nodes; use the int8 export")
        try:
            ov.save_model(model, str(out / ENGINE_FILE), compress_to_fp16=precision == "fp16")
            ov.Core().read_model(str(out / ENGINE_FILE))  # OpenVINO does not always report an incomplete write
        except RuntimeError as error:
            raise OSError(
                errno.EIO,
                f"OpenVINO cannot write or read it again, is the disk full? ({error})",
                str(out / ENGINE_FILE),
            ) from error
        save_info(info, out, [ENGINE_FILE, WEIGHTS_FILE])
        return {name: out / name for name in (ENGINE_FILE, WEIGHTS_FILE, "engine.json")}
