"""ONNX Runtime on the CPU. The engine is the ONNX file. Its graph is optimised for the machine when the file is opened."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, TypedDict

import numpy as np

from ..errors import EngineError, RuntimeUnavailable
from ..measure.device import usable_cpus
from .base import census_words, check_channels, check_input, check_output, describe_onnx, problem, resolve, save_info

RUNTIME = "onnxruntime"
ENGINE_FILE = "engine.onnx"
OPTIMISATION = {
    "none": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
_KERNEL = "_kernel_time"  # suffix of the profile's events with the time of a node
_ARITHMETIC = {"float": "fp32", "float16": "fp16", "uint8": "int8", "int8": "int8"}


class _Node(TypedDict, total=False):
    op_name: str
    input_type_shape: List[Dict[str, List[int]]]  # one per input: type -> shape


class _Kernel(TypedDict):
    """Event of a profile: one run of a node."""

    name: str  # ends in `_KERNEL`
    dur: float  # microseconds
    args: _Node


def _library() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeUnavailable(f"onnxruntime does not import ({error})", "pip install onnxruntime") from error
    return onnxruntime


def open_session(file: Path, threads: int, optimisation: str = "all", profile: str = "") -> Any:
    """Open a session of ONNX Runtime on the CPU.

    Args:
        optimisation: level of graph optimisation, a key of `OPTIMISATION`.
        profile: path prefix of the profile that the session writes. Empty: no profile.

    Raises:
        EngineError: the library rejects the graph.
    """
    ort = _library()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, OPTIMISATION[optimisation])
    options.log_severity_level = 3
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    try:
        return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library's exceptions have no common public base
        raise EngineError(f"{file}: ONNX Runtime {ort.__version__} rejects it: {error}") from error


class OrtBackend:
    """Backend for ONNX Runtime's CPU provider.

    Args:
        path: directory made by `build`, or an ONNX file with Ultralytics' metadata.
        threads: threads of one inference. None: one per usable processor.
        precision: for a directory, the required precision (None: any). For an ONNX file, the precision of the file (None: fp32).
        optimisation: level of graph optimisation: none, basic, extended or all.

    Raises:
        RuntimeUnavailable: the library is missing.
        EngineError: the engine is altered or inconsistent, or the library rejects it.
    """

    def __init__(
        self, path: Path, threads: Optional[int] = None, precision: Optional[str] = None, optimisation: str = "all"
    ) -> None:
        ort = _library()
        if optimisation not in OPTIMISATION:
            raise EngineError(f"optimisation {optimisation!r}, expected one of {', '.join(OPTIMISATION)}")
        path = Path(path)
        self.info = resolve(path, RUNTIME, precision, ort.__version__, [ENGINE_FILE])
        self._file = path / ENGINE_FILE if path.is_dir() else path
        self.names, self.precision, self.imgsz = self.info.names, self.info.precision, self.info.imgsz
        self.needs_nms = self.info.needs_nms
        self.threads = threads or usable_cpus()
        self._optimisation = optimisation
        self._executed: Optional[str] = None
        self._session = open_session(self._file, self.threads, optimisation)
        self._input, output = self._session.get_inputs()[0], self._session.get_outputs()[0]
        check_output(self.info, output.shape, self._file)
        if self._input.type != "tensor(float)" or output.type != "tensor(float)":
            raise EngineError(f"{self._file}: takes {self._input.type}, gives {output.type}; tensor(float) expected")
        batch, channels, height, width = self._input.shape
        self.channels = check_channels(channels, self._file)
        self.batch: Optional[int] = batch if isinstance(batch, int) else None
        if (isinstance(height, int) and height != self.imgsz[0]) or (isinstance(width, int) and width != self.imgsz[1]):
            raise EngineError(f"{self._file}: takes {height}x{width} px, its metadata says {self.imgsz}; export again")

    def __call__(self, images_BCHW: np.ndarray, copy: bool = True) -> np.ndarray:
        images_BCHW = check_input(images_BCHW, self)
        return self._session.run(None, {self._input.name: images_BCHW})[0]

    def bind(self, images_BCHW: np.ndarray) -> Callable[[], Any]:
        feed = {self._input.name: check_input(images_BCHW, self)}
        return lambda: self._session.run(None, feed)

    @property
    def executed(self) -> str:
        """Number types of the convolutions as text, from the input types in a profile of one inference.

        On CPUs without FP16 kernels, FP16 graphs run in FP32 with casts. The profile shows this.
        """
        if self._executed is None:
            counts, casts = self._census()
            words = census_words(self.precision, counts)
            if self.precision == "fp16" and set(counts) == {"fp32"}:
                words = f"fp32 (fp16 weights, {casts} casts)"
            self._executed = words
        return self._executed

    def _census(self) -> Tuple[Dict[str, int], int]:
        """Return the number of convolutions by arithmetic, and the number of casts, from one profiled inference."""
        nodes = [event["args"] for event in self._profile(1)]
        counts: Counter = Counter()
        for node in nodes:
            if "Conv" in node.get("op_name", ""):
                kind = next(iter(node["input_type_shape"][0]))
                counts[_ARITHMETIC.get(kind, kind)] += 1
        return dict(counts), sum(node.get("op_name") == "Cast" for node in nodes)

    def node_ms(self, runs: int) -> Dict[str, float]:
        """Return a dict from node to time in ms: the minimum over `runs` inferences of the optimised graph.

        The key is the name of the node's output or of the ONNX node.
        """
        samples: Dict[str, List[float]] = {}
        for event in self._profile(runs):
            samples.setdefault(event["name"][: -len(_KERNEL)], []).append(event["dur"] / 1e3)
        return {name: min(values) for name, values in samples.items()}

    def _profile(self, runs: int) -> List[_Kernel]:
        """Return the kernel events in the profile of `runs` inferences on a blank image, in a separate session."""
        folder = tempfile.mkdtemp(prefix="yolo_compress_profile_")
        try:
            session = open_session(self._file, self.threads, self._optimisation, str(Path(folder) / "ort"))
            blank = np.zeros((self.batch or 1, self.channels) + self.imgsz, np.float32)
            for _ in range(runs):
                session.run(None, {self._input.name: blank})
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        finally:
            shutil.rmtree(folder)
        return [event for event in events if event.get("cat") == "Node" and event["name"].endswith(_KERNEL)]

    def __enter__(self) -> "OrtBackend":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._session = None

    @staticmethod
    def form() -> str:
        """Return the kind of INT8 file that this runtime needs: the `form` of a `registry.Int8File`."""
        return "onnxruntime"

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
        """Copy an ONNX file into the folder `out` and test the copy with one inference. Return the written files by name.

        `onnx` must have been exported for `precision`.

        Raises:
            EngineError: ONNX Runtime rejects the file, or the precision is int8 and the graph has no quantisation.
        """
        ort = _library()
        info = describe_onnx(Path(onnx), RUNTIME, precision, ort.__version__, names, imgsz)
        if precision == "int8" and b"QuantizeLinear" not in Path(onnx).read_bytes():
            raise EngineError(f"{onnx}: int8 requested, but the graph has no Q/DQ nodes; use the int8 export")
        out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(onnx, out / ENGINE_FILE)
        save_info(info, out, [ENGINE_FILE])
        with OrtBackend(out) as engine:
            engine(np.zeros((engine.batch or 1, engine.channels) + engine.imgsz, np.float32))
        return {name: out / name for name in (ENGINE_FILE, "engine.json")}
