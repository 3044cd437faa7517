"""TensorRT 8.5 to 11.x: runs a plan file, by the features that the installed version has.

Nothing in this file, `tensorrt_build.py` or `cuda.py` ever ran on real TensorRT or on a device. Names are checked against the
bindings of 8.6 to 11.4 (test_tensorrt_api.py), 8.5 is by documentation. All versions from 8.5 have named I/O tensors and
`execute_async_v3`, so the older binding interface is not used.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np

from . import cuda
from .backend import census_words, check_input, check_output, resolve
from .errors import EngineError, RuntimeUnavailable

RUNTIME = "tensorrt"
ENGINE_FILE = "engine.plan"
HINT = "pip install tensorrt on a machine with an NVIDIA GPU; on a Jetson: sudo apt install python3-libnvinfer"


def library() -> Any:
    """The tensorrt module, after the driver was seen to work.

    Raises:
        RuntimeUnavailable: no bindings, no driver or no device.
    """
    try:
        import tensorrt
    except (ImportError, OSError) as error:
        raise RuntimeUnavailable(f"tensorrt does not import ({error})", HINT) from error
    problem = cuda.driver_problem()
    if problem is not None:
        raise RuntimeUnavailable(problem, "install NVIDIA's driver, or give the container the GPU (--gpus all)")
    return tensorrt


class TensorRTBackend:
    """A plan with one float32 input and one float32 output. Plans only run where they were built.

    Args:
        path: directory made by `build`.
        precision: that the engine must have, or None.

    Raises:
        RuntimeUnavailable: bindings, driver, device or CUDA memory from Python missing.
        EngineError: an altered engine, or one of another TensorRT, GPU or signature.
    """

    def __init__(self, path: Path, precision: Optional[str] = None) -> None:
        trt = library()
        path = Path(path)
        if not path.is_dir():
            raise EngineError(f"{path}: TensorRT opens engine directories only; build one from the ONNX")
        self.info = resolve(path, RUNTIME, precision, trt.__version__, [ENGINE_FILE])
        self.names, self.precision, self.imgsz = self.info.names, self.info.precision, self.info.imgsz
        if self.info.library != trt.__version__:
            raise EngineError(
                f"{path}: built with TensorRT {self.info.library}, here {trt.__version__}; plans do not carry over, "
                "build the engine again on this machine"
            )
        self._trt = trt
        self._file = path / ENGINE_FILE
        self._pointers: Dict[str, Tuple[int, int]] = {}  # tensor -> (size, device pointer)
        self._memory = cuda.open_memory()
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    def _load(self) -> None:
        """Deserialise the plan and look at its tensors."""
        trt = self._trt
        self._runtime: Any = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        self._engine: Any = self._runtime.deserialize_cuda_engine(self._file.read_bytes())
        if self._engine is None:
            raise EngineError(
                f"{self._file}: TensorRT {trt.__version__} cannot load it (another GPU?); build the engine again here"
            )
        self._context: Any = self._engine.create_execution_context()
        if self._context is None:
            raise EngineError(
                f"{self._file}: no execution context (device memory full?); TensorRT's log (stderr) says why"
            )
        self._input, self._output = self._signature()
        batch = self._engine.get_tensor_shape(self._input)[0]
        self.batch: Optional[int] = None if batch < 0 else int(batch)

    def _signature(self) -> Tuple[str, str]:
        """Names of the input and the output; refuses any other signature."""
        engine, trt = self._engine, self._trt
        tensors = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [t for t in tensors if engine.get_tensor_mode(t) == trt.TensorIOMode.INPUT]
        outputs = [t for t in tensors if engine.get_tensor_mode(t) == trt.TensorIOMode.OUTPUT]
        floats = all(engine.get_tensor_dtype(t) == trt.DataType.FLOAT for t in tensors)
        if len(inputs) != 1 or len(outputs) != 1 or not floats:
            raise EngineError(f"{self._file}: tensors {tensors}; one float32 input and one float32 output expected")
        shape = tuple(engine.get_tensor_shape(inputs[0]))
        if shape[1:] != (3,) + self.imgsz:
            raise EngineError(f"{self._file}: takes {list(shape)}, its sidecar says {list(self.imgsz)} px")
        check_output(self.info, tuple(engine.get_tensor_shape(outputs[0])), self._file)
        return inputs[0], outputs[0]

    def _buffer(self, tensor: str, size: int) -> int:
        """Device buffer of a tensor, replaced by a larger one when a larger batch comes."""
        held, pointer = self._pointers.get(tensor, (0, 0))
        if held < size:
            pointer = self._memory.alloc(size)
            self._pointers[tensor] = (size, pointer)
        return pointer

    def _place(self, shape: Tuple[int, ...], source: int) -> Tuple[Tuple[int, ...], int]:
        """Tell the context the input's shape and both addresses; returns the output's shape and device pointer."""
        if not self._context.set_input_shape(self._input, shape):
            raise EngineError(f"{self._file}: built for other batches than {shape[0]}")
        gives = tuple(self._context.get_tensor_shape(self._output))
        result = self._buffer(self._output, 4 * math.prod(gives))
        self._context.set_tensor_address(self._input, source)
        self._context.set_tensor_address(self._output, result)
        return gives, result

    def _execute(self) -> None:
        if not self._context.execute_async_v3(self._memory.stream):
            raise EngineError(f"{self._file}: TensorRT could not enqueue an inference; its log (stderr) says why")

    def __call__(self, images_BCHW: np.ndarray, copy: bool = True) -> np.ndarray:
        images_BCHW = check_input(images_BCHW, self.imgsz, self.batch)
        source = self._buffer(self._input, images_BCHW.nbytes)
        gives, result = self._place(images_BCHW.shape, source)
        output = np.empty(gives, np.float32)
        self._memory.to_device(source, images_BCHW)
        self._execute()
        self._memory.to_host(output, result)
        self._memory.synchronize()
        return output

    def bind(self, images_BCHW: np.ndarray) -> Callable[[], Any]:
        images_BCHW = check_input(images_BCHW, self.imgsz, self.batch)
        shape = images_BCHW.shape
        source = self._memory.alloc(images_BCHW.nbytes)  # its own: several are bound at a time
        self._place(shape, source)
        self._memory.to_device(source, images_BCHW)
        self._memory.synchronize()

        def run() -> None:
            self._place(shape, source)  # host work of microseconds; another call may have moved the context's addresses
            self._execute()
            self._memory.synchronize()

        return run

    @property
    def executed(self) -> str:
        """Convolutions by the type of their input, from the engine inspector (needs the plan's own detailed report)."""
        inspector = self._engine.create_engine_inspector()
        report = json.loads(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))
        return census_words(self.precision, convolution_types(report.get("Layers", [])))

    def node_ms(self, runs: int) -> Dict[str, float]:
        """Least milliseconds of each layer of the plan, by name; fused layers carry the names of all their nodes.

        The profiler stays on this context and slows it: open the engine anew for the time of the whole.
        """
        samples: Dict[str, List[float]] = {}

        class Profiler(self._trt.IProfiler):  # type: ignore[name-defined]
            def __init__(self, base: Any) -> None:
                base.__init__(self)  # TensorRT's binding refuses super()

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                samples.setdefault(layer_name, []).append(ms)

        profiler = Profiler(self._trt.IProfiler)
        self._context.profiler = profiler
        call = self.bind(np.zeros((self.batch or 1, 3) + self.imgsz, np.float32))
        for _ in range(runs):
            call()
        return {name: min(values) for name, values in samples.items()}

    def close(self) -> None:
        """Free device memory; the engine cannot be used afterwards."""
        self._context = self._engine = self._runtime = None
        self._memory.close()

    def __enter__(self) -> "TensorRTBackend":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    @staticmethod
    def probe() -> Optional[str]:
        """None where this runtime works, else what is missing and what to install."""
        try:
            library()
            cuda.open_memory().close()
        except RuntimeUnavailable as error:
            return str(error)
        return None

    @staticmethod
    def build(
        onnx: Path,
        out: Path,
        precision: str,
        names: Optional[Sequence[str]] = None,
        imgsz: Optional[Tuple[int, int]] = None,
        **options: Any,
    ) -> Dict[str, Path]:
        """Build a plan on this machine; options are those of `tensorrt_build.build`."""
        from .tensorrt_build import build

        return build(Path(onnx), Path(out), precision, names, imgsz, **options)


def convolution_types(layers: Sequence[Any]) -> Dict[str, int]:
    """Count convolution layers of an inspector report by arithmetic.

    Up to 10.x an input says {"Format/Datatype": "... Int8 format"}, 11.x {"Format": ..., "DataType": ...}. A report of
    names only (plan built without detailed profiling) counts as nothing.
    """
    counts: Counter = Counter()
    for layer in layers:
        if not isinstance(layer, dict):
            continue
        kind = f"{layer.get('LayerType', '')} {layer.get('ParameterType', '')}".lower()
        if not ("conv" in kind or "correlation" in kind) or not layer.get("Inputs"):
            continue
        said = " ".join(str(value) for key, value in layer["Inputs"][0].items() if "type" in key.lower()).lower()
        for word, arithmetic in _WORDS:
            if word in said:
                counts[arithmetic] += 1
                break
        else:
            counts[said or "unknown"] += 1
    return dict(counts)


_WORDS: Tuple[Tuple[str, str], ...] = (
    ("int8", "int8"),
    ("bf16", "bf16"),
    ("bfloat16", "bf16"),
    ("fp16", "fp16"),
    ("half", "fp16"),
)
_WORDS += (("fp32", "fp32"), ("float", "fp32"))
