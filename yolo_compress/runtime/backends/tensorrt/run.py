"""Run a plan file with TensorRT 8.5 to 11.x, by the features of the installed version.

The files in this folder never ran on real TensorRT or on a device. Names are checked against the bindings of 8.6 to 11.4
(test_tensorrt_api.py); 8.5 follows its documentation. All versions from 8.5 on have named I/O tensors and `execute_async_v3`, so
the older binding interface is not used.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np

from ...errors import EngineError
from ..base import EngineInfo, census_words, check_channels, check_input, check_output, problem, resolve
from . import cuda
from .build import build, strongly_typed
from .execution import Execution, Tensors
from .library import ENGINE_FILE, GPU, RUNTIME, library
from .log import logger, runtime

GRAPH_VARIABLE = "YOLO_COMPRESS_CUDA_GRAPH"


def built_elsewhere(info: EngineInfo) -> Optional[str]:
    """Return a message if a plan was built on another GPU. None: it was built on this GPU.

    TensorRT only warns about some such plans. If the sidecar `engine.json` does not state the GPU, the result is None.
    """
    built_on, here = info.built_on.get(GPU), cuda.device_name()
    return None if built_on in (None, here) else f"built on {built_on}, here is {here}"


def _wanted(cuda_graph: Optional[bool]) -> bool:
    """Return whether to use a CUDA graph: the argument if given, else the environment variable, else True."""
    setting = os.environ.get(GRAPH_VARIABLE) or "1"
    if setting not in ("0", "1"):
        raise EngineError(f"{GRAPH_VARIABLE}={setting}: 0 or 1 expected")
    return setting == "1" if cuda_graph is None else cuda_graph


class TensorRTBackend:
    """Backend for a TensorRT plan with one float32 input and one float32 output. A plan runs only on the kind of GPU that built it.

    Args:
        path: directory made by `build`.
        precision: required precision of the engine. None: any.
        cuda_graph: Whether to run inferences as a CUDA graph, if TensorRT's work can be captured. `executed` says whether it was.
            None: use the environment variable YOLO_COMPRESS_CUDA_GRAPH (0 or 1, default 1).

    Raises:
        RuntimeUnavailable: the bindings, the driver, a device or access to CUDA memory from Python is missing.
        EngineError: the engine is altered, was built for another TensorRT version or GPU, or has other inputs or outputs.
        CudaError: there is not enough device memory.
    """

    def __init__(self, path: Path, precision: Optional[str] = None, cuda_graph: Optional[bool] = None) -> None:
        self._refused = None if _wanted(cuda_graph) else "turned off"
        trt = library()
        path = Path(path)
        if not path.is_dir():
            raise EngineError(f"{path}: TensorRT opens engine directories only; build one from the ONNX")
        self.info = resolve(path, RUNTIME, precision, trt.__version__, [ENGINE_FILE])
        self.names, self.precision, self.imgsz = self.info.names, self.info.precision, self.info.imgsz
        self.needs_nms = self.info.needs_nms
        if self.info.library != trt.__version__:
            raise EngineError(
                f"{path}: built with TensorRT {self.info.library}, here {trt.__version__}; plans are not portable, "
                "build the engine again on this machine"
            )
        elsewhere = built_elsewhere(self.info)
        if elsewhere is not None:
            raise EngineError(f"{path}: {elsewhere}; plans are not portable, build the engine again here")
        self._trt = trt
        self._file = path / ENGINE_FILE
        self._executions: List[Execution] = []
        self._runtime: Any = None
        self._engine: Any = None
        self._memory = cuda.open_memory()
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    def _load(self) -> None:
        """Deserialise the plan, check its tensors, and run it twice to capture its CUDA graph."""
        log = logger(self._trt)
        self._runtime = runtime(self._trt)
        log.take()
        self._engine = self._runtime.deserialize_cuda_engine(self._file.read_bytes())
        if self._engine is None:
            raise EngineError(
                f"{self._file}: TensorRT {self._trt.__version__} cannot load it (another GPU?){log.words()}; "
                "build the engine again here"
            )
        self._tensors = self._signature()
        batch = self._engine.get_tensor_shape(self._tensors.input)[0]
        self.batch: Optional[int] = None if batch < 0 else int(batch)
        self._main = self._execution()
        if self._refused is None:
            self._main.fit((self.batch or 1, self.channels) + self.imgsz)
            self._main.source.host[...] = 0
            for _ in range(2):  # the second run is captured
                self._main()

    def _execution(self, transfers: bool = True, refused: Optional[str] = None) -> Execution:
        made = Execution(
            self._engine, self._memory, self._tensors, self._file, refused or self._refused, transfers=transfers
        )
        self._executions.append(made)
        return made

    def _signature(self) -> Tensors:
        """Return the names of the input and the output. Raise EngineError if the plan has other tensors."""
        engine, trt = self._engine, self._trt
        tensors = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [t for t in tensors if engine.get_tensor_mode(t) == trt.TensorIOMode.INPUT]
        outputs = [t for t in tensors if engine.get_tensor_mode(t) == trt.TensorIOMode.OUTPUT]
        floats = all(engine.get_tensor_dtype(t) == trt.DataType.FLOAT for t in tensors)
        if len(inputs) != 1 or len(outputs) != 1 or not floats:
            raise EngineError(f"{self._file}: tensors {tensors}; one float32 input and one float32 output expected")
        shape = tuple(engine.get_tensor_shape(inputs[0]))
        if len(shape) != 4 or shape[2:] != self.imgsz:
            raise EngineError(f"{self._file}: takes {list(shape)}, its sidecar says {list(self.imgsz)} px")
        self.channels = check_channels(shape[1], self._file)
        check_output(self.info, tuple(engine.get_tensor_shape(outputs[0])), self._file)
        return Tensors(inputs[0], outputs[0])

    def __call__(self, images_BCHW: np.ndarray, copy: bool = True) -> np.ndarray:
        images_BCHW = check_input(images_BCHW, self)
        self._main.fit(images_BCHW.shape)
        self._main.source.host[...] = images_BCHW
        self._main()
        output = self._main.result.host  # page-locked memory, freed by `close` and by a larger batch
        return output.copy() if copy else output

    def bind(self, images_BCHW: np.ndarray) -> Callable[[], Any]:
        """Return a function that runs one inference on these images and waits for the GPU.

        Each such function has its own execution context and activations in device memory until the engine is closed.
        """
        images_BCHW = check_input(images_BCHW, self)
        run = self._execution(transfers=False, refused=self._main.refused)
        run.fit(images_BCHW.shape)
        self._memory.to_device(run.source.pointer, images_BCHW)
        for _ in range(2):  # the second run is captured
            run()
        return run

    @property
    def executed(self) -> str:
        """Number types of the convolutions as text, from the engine inspector, and whether all inferences run as CUDA graphs.

        The inspector needs a plan that was built with detailed profiling.
        """
        inspector = self._engine.create_engine_inspector()
        report = json.loads(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))
        words = census_words(self.precision, convolution_types(report.get("Layers", [])))
        refused = next((each.refused for each in self._executions if each.refused is not None), None)
        return f"{words}, CUDA graph" if refused is None else f"{words}, no CUDA graph: {refused}"

    def node_ms(self, runs: int) -> Dict[str, float]:
        """Return a dict from layer name in the plan to time in ms: the minimum over `runs` inferences.

        The name of a fused layer contains the names of all its nodes.

        The profiler slows the inference and cannot time a graph, so use `bind` to measure the latency.
        """
        samples: Dict[str, List[float]] = {}

        class Profiler(self._trt.IProfiler):  # type: ignore[name-defined]
            def __init__(self, base: Any) -> None:
                base.__init__(self)  # TensorRT's binding refuses super()

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                samples.setdefault(layer_name, []).append(ms)

        profiler = Profiler(self._trt.IProfiler)
        run = self._execution(transfers=False, refused="profiled")
        run.context.profiler = profiler
        run.fit((self.batch or 1, self.channels) + self.imgsz)
        self._memory.to_device(run.source.pointer, np.zeros((self.batch or 1, self.channels) + self.imgsz, np.float32))
        for _ in range(runs):
            run()
        self._executions.remove(run)
        run.close()
        return {name: min(values) for name, values in samples.items()}

    def close(self) -> None:
        """Free device and page-locked memory. Afterwards, do not use the engine, or an output that was not copied."""
        if self._executions:
            self._memory.synchronize()
        while self._executions:
            self._executions.pop().close()
        self._engine = None
        self._runtime = None
        self._memory.close()

    def __enter__(self) -> "TensorRTBackend":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    @staticmethod
    def form() -> str:
        """Return the kind of INT8 file that this TensorRT version needs: the `form` of a `registry.Int8File`."""
        return "tensorrt11" if strongly_typed() else "tensorrt10"

    @staticmethod
    def probe() -> Optional[str]:
        """Return a text that says what is missing and what to install. None: this runtime works."""
        return problem(library) or problem(lambda: cuda.open_memory().close())

    @staticmethod
    def build(
        onnx: Path,
        out: Path,
        precision: str,
        names: Optional[Sequence[str]] = None,
        imgsz: Optional[Tuple[int, int]] = None,
        **options: Any,
    ) -> Dict[str, Path]:
        """Build a TensorRT plan on this machine, and return the written files by name. For `options` see `build.build`."""
        return build(Path(onnx), Path(out), precision, names, imgsz, **options)


def convolution_types(layers: Sequence[Any]) -> Dict[str, int]:
    """Count the convolution layers of an inspector report by arithmetic.

    Up to 10.x an input has {"Format/Datatype": "... Int8 format"}, in 11.x {"Format": ..., "DataType": ...}. If the plan was
    built without detailed profiling, the report has only names, and the result is empty.
    """
    counts: Counter = Counter()
    for layer in layers:
        if not isinstance(layer, dict):
            continue
        kind = f"{layer.get('LayerType', '')} {layer.get('ParameterType', '')}".lower()
        if not ("conv" in kind or "correlation" in kind) or not layer.get("Inputs"):
            continue
        datatype = " ".join(str(value) for key, value in layer["Inputs"][0].items() if "type" in key.lower()).lower()
        for word, arithmetic in _WORDS:
            if word in datatype:
                counts[arithmetic] += 1
                break
        else:
            counts[datatype or "unknown"] += 1
    return dict(counts)


_WORDS: Tuple[Tuple[str, str], ...] = (
    ("int8", "int8"),
    ("bf16", "bf16"),
    ("bfloat16", "bf16"),
    ("fp16", "fp16"),
    ("half", "fp16"),
)
_WORDS += (("fp32", "fp32"), ("float", "fp32"))
