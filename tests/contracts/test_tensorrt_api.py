"""Every name that we use of TensorRT exists in each version's real bindings; the sequence of calls gives the right engine.

A stand-in module is made from each `api-*.json` (names dumped from NVIDIA's wheels): an attribute that the version lacks is
an AttributeError, as it would be on the robot. What the calls do is by NVIDIA's documentation; no TensorRT runs here.
"""

from __future__ import annotations

import ast
import enum
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from yolo_compress.runtime import cuda
from yolo_compress.runtime.backend import SIDECAR
from yolo_compress.runtime.errors import EngineError, RuntimeUnavailable
from yolo_compress.runtime.tensorrt import ENGINE_FILE, TensorRTBackend, convolution_types
from yolo_compress.runtime.tensorrt_build import TIMING_CACHE, build

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("YOLO_COMPRESS_TENSORRT_APIS") or ROOT.parent / "shared" / "tensorrt")
APIS = sorted(FOLDER.glob("api-*.json"))
NAMES, IMGSZ, ANCHORS = ("bolt", "nut"), (32, 64), 5

pytestmark = pytest.mark.skipif(
    not APIS, reason="no api-*.json of TensorRT's bindings in YOLO_COMPRESS_TENSORRT_APIS or ../shared/tensorrt"
)


# ---- the stand-in


class Dims(list):
    """As tensorrt.Dims: indexed, sliced, iterated; equal to no tuple."""


class HostMemory:
    def __init__(self, content: bytes) -> None:
        self._content = content

    def __bytes__(self) -> bytes:
        return self._content


class Member(enum.Enum):
    """As pybind11's enumerations: `int()` takes a member, arithmetic does not."""

    def __int__(self) -> int:
        return int(self.value)


def strict(name: str, allowed: list[str], /, **behaviour: Any) -> Any:
    """An object of which only the version's names can be read or set; what has no behaviour is a plain attribute."""

    class Strict:
        def __getattr__(self, attribute: str) -> Any:
            if attribute not in allowed:
                raise AttributeError(f"tensorrt.{name} has no attribute {attribute!r} in this version")
            if attribute not in behaviour:
                raise AssertionError(f"the stand-in knows nothing of tensorrt.{name}.{attribute}: describe it here")
            return behaviour[attribute]

        def __setattr__(self, attribute: str, value: Any) -> None:
            if attribute not in allowed:
                raise AttributeError(f"tensorrt.{name} has no attribute {attribute!r} in this version")
            behaviour[attribute] = value

    return Strict()


class FakeMemory:
    """Device memory in a dict; a copy out of bounds is an error."""

    stream = 77

    def __init__(self) -> None:
        self.blocks: dict[int, bytearray] = {}
        self.closed = False

    def alloc(self, size: int) -> int:
        pointer = 4096 * (len(self.blocks) + 1)
        self.blocks[pointer] = bytearray(size)
        return pointer

    def to_device(self, pointer: int, host: np.ndarray) -> None:
        assert host.nbytes <= len(self.blocks[pointer])
        self.blocks[pointer][: host.nbytes] = host.tobytes()

    def to_host(self, host: np.ndarray, pointer: int) -> None:
        assert host.nbytes <= len(self.blocks[pointer])
        host[...] = np.frombuffer(bytes(self.blocks[pointer][: host.nbytes]), np.float32).reshape(host.shape)

    def synchronize(self) -> None:
        assert not self.closed

    def close(self) -> None:
        self.blocks.clear()
        self.closed = True


class FakeTensorRT(ModuleType):
    """One version. An "ONNX file" is text: words `half`, `qdq`, `dynamic`, `free` (dynamic size), `broken`, `unbuildable`."""

    def __init__(self, api: dict[str, Any], memory: FakeMemory) -> None:
        super().__init__("tensorrt")
        self.api, self.memory = api, memory
        self.__version__ = api["__version__"]
        self.built: dict[str, Any] = {}
        self.deserialised = 0
        self.load = True
        self.stale_cache = False
        self.parts: dict[str, Any] = {
            "Builder": self._builder,
            "Runtime": self._runtime,
            "OnnxParser": self._parser,
            "Logger": self._logger_class(),
        }
        if "report_layer_time" in api.get("IProfiler", ()):
            self.parts["IProfiler"] = type("IProfiler", (), {})

    def __getattr__(self, name: str) -> Any:
        api = self.__dict__["api"]
        if name not in api["__top__"]:
            raise AttributeError(f"module 'tensorrt' {api['__version__']} has no attribute {name!r}")
        if name in self.__dict__["parts"]:
            return self.__dict__["parts"][name]
        members = api[name]
        assert all(member.isupper() or "_" in member or member[0].isupper() for member in members), name
        made: Any = Member(name, {member: index for index, member in enumerate(members)})  # type: ignore[call-arg]
        self.__dict__["parts"][name] = made
        return made

    def strict(self, name: str, /, **behaviour: Any) -> Any:
        return strict(name, self.api[name], **behaviour)

    def _logger_class(self) -> Any:
        def made(severity: int) -> Any:
            return self.strict("Logger")

        for level in ("WARNING", "ERROR", "VERBOSE", "INFO"):
            assert level in self.api["Logger"]
            setattr(made, level, level)
        return made

    # -- building

    def _builder(self, logger: Any) -> Any:
        return self.strict(
            "Builder",
            create_network=self._network,
            create_builder_config=self._config,
            create_optimization_profile=lambda: self.strict("IOptimizationProfile", set_shape=self._set_shape),
            build_serialized_network=self._build,
        )

    def _set_shape(self, name: str, smallest: Any, usual: Any, largest: Any) -> None:
        assert name == "images"
        self.built["profile"] = (tuple(smallest), tuple(usual), tuple(largest))

    def _network(self, flags: int) -> Any:
        members = self.NetworkDefinitionCreationFlag
        self.built = {
            "network_flags": {m.name for m in members if flags & (1 << int(m))},
            "flags": {"TF32"},
            "profiles": 0,
        }
        layers: list[Any] = []
        self.built["layers"] = layers
        self.built["network"] = self.strict("INetworkDefinition", get_layer=lambda index: layers[index], num_layers=0)
        return self.built["network"]

    def _layer(self, kind: str, dtype: str) -> Any:
        tensor = self.strict("ITensor", dtype=getattr(self.DataType, dtype))
        return self.strict("ILayer", type=getattr(self.LayerType, kind), num_outputs=1, get_output=lambda index: tensor)

    def _parser(self, network: Any, logger: Any) -> Any:
        error = self.strict("ParserError", desc=lambda: "node 7: no importer for Moebius")

        def parse(content: bytes) -> bool:
            words = content.decode().split()
            self.built["words"] = words
            self.built["layers"].append(self._layer("CONVOLUTION", "HALF" if "half" in words else "FLOAT"))
            if "qdq" in words:
                self.built["layers"].append(self._layer("QUANTIZE", "INT8"))
            batch, width = -1 if "dynamic" in words else 1, -1 if "free" in words else IMGSZ[1]
            source = self.strict("ITensor", name="images", shape=Dims([batch, 3, IMGSZ[0], width]))
            allowed = {"get_layer": lambda index: self.built["layers"][index], "get_input": lambda index: source}
            for name, value in {**allowed, "num_layers": len(self.built["layers"])}.items():
                setattr(network, name, value)
            return "broken" not in words

        return self.strict("OnnxParser", parse=parse, num_errors=1, get_error=lambda index: error)

    def _config(self) -> Any:
        built = self.built

        def create_cache(content: bytes) -> Any:
            built.setdefault("caches", []).append(content)
            return self.strict("ITimingCache", serialize=lambda: HostMemory(b"cache:" + content))

        def set_cache(cache: Any, ignore_mismatch: bool) -> bool:
            assert ignore_mismatch is False
            return not (self.stale_cache and built["caches"][-1])

        def add_profile(profile: Any) -> int:
            built["profiles"] += 1
            return 0

        def flag(action: Any) -> Any:
            return lambda member: action(member.name)

        config = self.strict(
            "IBuilderConfig",
            set_flag=flag(built["flags"].add),
            clear_flag=flag(built["flags"].discard),
            set_memory_pool_limit=lambda pool, size: built.update(pool=(pool.name, size)),
            create_timing_cache=create_cache,
            set_timing_cache=set_cache,
            add_optimization_profile=add_profile,
        )
        built["config"] = config
        return config

    def _build(self, network: Any, config: Any) -> Any:
        assert network is self.built["network"] and config is self.built["config"]
        assert config.profiling_verbosity == self.ProfilingVerbosity.DETAILED
        if "unbuildable" in self.built["words"]:
            return None
        dynamic = "dynamic" in self.built["words"]
        if dynamic:
            assert self.built["profiles"] == 1, "TensorRT refuses a dynamic network without a profile"
        largest = self.built["profile"][2][0] if dynamic else 1
        return HostMemory(json.dumps({"batch": -1 if dynamic else 1, "largest": largest}).encode())

    # -- running

    def _runtime(self, logger: Any) -> Any:
        return self.strict("Runtime", deserialize_cuda_engine=self._engine)

    def _engine(self, plan: bytes) -> Any:
        self.deserialised += 1
        if not self.load:
            return None
        described = json.loads(plan)
        batch = described["batch"]
        shapes = {"images": Dims([batch, 3, *IMGSZ]), "output0": Dims([batch, 4 + len(NAMES), ANCHORS])}
        modes = {"images": self.TensorIOMode.INPUT, "output0": self.TensorIOMode.OUTPUT}
        tensors = list(shapes)
        new = self.__version__.startswith("11")
        kind = (
            {"Format": "NC/32HW32", "DataType": "Int8"} if new else {"Format/Datatype": "Thirty-two wide Int8 format"}
        )
        half = {"Format": "N/A", "DataType": "Half"} if new else {"Format/Datatype": "Channel major FP16 format"}
        layers = [{"LayerType": "CaskConvolution", "Inputs": [kind]}] * 3
        layers += [{"LayerType": "CaskConvolution", "Inputs": [half]}, {"LayerType": "PoolingV2", "Inputs": [half]}]

        def inspect(form: Any) -> str:
            assert form == self.LayerInformationFormat.JSON
            return json.dumps({"Layers": [*layers, "a name only"]})

        return self.strict(
            "ICudaEngine",
            num_io_tensors=2,
            get_tensor_name=lambda index: tensors[index],
            get_tensor_mode=modes.__getitem__,
            get_tensor_dtype=lambda name: self.DataType.FLOAT,
            get_tensor_shape=shapes.__getitem__,
            create_execution_context=lambda: self._context(described),
            create_engine_inspector=lambda: self.strict("EngineInspector", get_engine_information=inspect),
        )

    def _context(self, described: dict[str, Any]) -> Any:
        state: dict[str, Any] = {"address": {}}

        def set_shape(name: str, shape: Any) -> bool:
            fits = 1 <= shape[0] <= described["largest"]
            state["shape"] = tuple(shape) if fits else state.get("shape")
            return fits

        def get_shape(name: str) -> Dims:
            return Dims([state["shape"][0], 4 + len(NAMES), ANCHORS])

        def execute(stream: int) -> bool:
            assert stream == FakeMemory.stream
            size = 4 * int(np.prod(state["shape"]))
            block = self.memory.blocks[state["address"]["images"]][:size]
            images = np.frombuffer(bytes(block), np.float32).reshape(state["shape"])
            output = expected(images)
            target = self.memory.blocks[state["address"]["output0"]]
            assert output.nbytes <= len(target)
            target[: output.nbytes] = output.tobytes()
            if context.profiler is not None:
                for layer, ms in (("/model.0/conv/Conv + PWN(/model.0/act/Mul)", 0.25), ("Reformat", 0.125)):
                    context.profiler.report_layer_time(layer, ms)
            return True

        context = self.strict(
            "IExecutionContext",
            profiler=None,
            set_input_shape=set_shape,
            get_tensor_shape=get_shape,
            set_tensor_address=lambda name, pointer: state["address"].update({name: pointer}),
            execute_async_v3=execute,
        )
        return context


def expected(images: np.ndarray) -> np.ndarray:
    """What the stand-in's network computes: the image's mean plus the row's number."""
    rows = np.arange(4 + len(NAMES), dtype=np.float32)[None, :, None]
    return np.broadcast_to(
        images.mean(axis=(1, 2, 3))[:, None, None] + rows, (len(images), len(rows[0]), ANCHORS)
    ).astype(np.float32)


@pytest.fixture(params=APIS, ids=lambda path: path.stem[len("api-") :])
def trt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    memory = FakeMemory()
    fake = FakeTensorRT(json.loads(request.param.read_text()), memory)
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setattr(cuda, "driver_problem", lambda: None)
    monkeypatch.setattr(cuda, "open_memory", lambda: memory)
    return fake


def major(trt: FakeTensorRT) -> int:
    return int(trt.__version__.split(".")[0])


def made(folder: Path, words: str, precision: str, **options: Any) -> Path:
    (folder / "model.onnx").write_text(words)
    files = build(folder / "model.onnx", folder / "engine", precision, NAMES, IMGSZ, **options)
    assert set(files) == {ENGINE_FILE, TIMING_CACHE, SIDECAR} == {p.name for p in (folder / "engine").iterdir()}
    return folder / "engine"


# ---- the contract


def test_the_range_of_versions_is_covered() -> None:
    versions = {path.stem[len("api-") :] for path in APIS}
    assert {version.split(".")[0] for version in versions} == {"8", "10", "11"}


def test_the_stand_in_refuses_what_a_version_lacks(trt: FakeTensorRT) -> None:
    assert hasattr(trt.BuilderFlag, "FP16") == (major(trt) < 11)
    assert hasattr(trt, "IInt8EntropyCalibrator2") == (major(trt) < 11)
    with pytest.raises(AttributeError, match="max_batches"):
        trt.Builder(trt.Logger(trt.Logger.WARNING)).max_batches = 1
    assert hasattr(trt._engine(b'{"batch": 1, "largest": 1}'), "num_io_tensors")
    with pytest.raises(AttributeError, match="binding_is_an_input"):
        _ = trt._engine(b'{"batch": 1, "largest": 1}').binding_is_an_input


@pytest.mark.parametrize(
    ("precision", "words", "flags"),
    [("fp32", "float", set()), ("fp16", "half", {"FP16"}), ("int8", "qdq", {"INT8", "FP16"})],
)
def test_every_precision_builds(precision: str, words: str, flags: set[str], trt: FakeTensorRT, tmp_path: Path) -> None:
    engine = made(tmp_path, words, precision, workspace_mib=512)
    wanted = {"SPARSE_WEIGHTS"} | (flags if major(trt) < 11 else set())  # in 11 the graph's own types decide
    assert trt.built["flags"] - {"TF32"} == wanted
    assert ("TF32" in trt.built["flags"]) == (precision != "fp32"), "fp32 is FP32"
    assert trt.built["network_flags"] == ({"EXPLICIT_BATCH"} if major(trt) < 11 else set())
    assert trt.built["pool"] == ("WORKSPACE", 512 << 20) and trt.built["profiles"] == 0
    sidecar = json.loads((engine / SIDECAR).read_text())
    assert (sidecar["runtime"], sidecar["library"], sidecar["precision"]) == ("tensorrt", trt.__version__, precision)
    assert sidecar["options"] == {"max_batch": 1, "workspace_mib": 512}


def test_a_graph_that_cannot_give_the_precision_is_refused(trt: FakeTensorRT, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no Q/DQ nodes"):
        made(tmp_path, "float", "int8")
    if major(trt) >= 11:
        with pytest.raises(EngineError, match="takes precision from the graph"):
            made(tmp_path, "float", "fp16")
    else:
        made(tmp_path, "float", "fp16")
        assert trt.built["flags"] >= {"FP16"}


def test_parser_and_builder_failures_are_told(trt: FakeTensorRT, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"cannot parse it: node 7: no importer for Moebius"):
        made(tmp_path, "broken", "fp32")
    with pytest.raises(EngineError, match="built no fp32 engine"):
        made(tmp_path, "unbuildable", "fp32")
    assert not (tmp_path / "engine").exists()


def test_a_dynamic_batch_gets_a_profile_and_other_dynamic_sizes_are_refused(trt: FakeTensorRT, tmp_path: Path) -> None:
    engine = made(tmp_path, "dynamic", "fp32", max_batch=4)
    assert trt.built["profile"] == ((1, 3, *IMGSZ), (1, 3, *IMGSZ), (4, 3, *IMGSZ))
    with TensorRTBackend(engine) as backend:
        assert backend.batch is None
        for count in (1, 4, 2):
            images = np.random.default_rng(count).random((count, 3, *IMGSZ), dtype=np.float32)
            assert np.allclose(backend(images), expected(images))
        with pytest.raises(EngineError, match="other batches than 5"):
            backend(np.zeros((5, 3, *IMGSZ), np.float32))
    with pytest.raises(EngineError, match="only the batch may be dynamic"):
        made(tmp_path, "free", "fp32")


def test_a_timing_cache_is_taken_up_or_replaced(trt: FakeTensorRT, tmp_path: Path) -> None:
    (tmp_path / "earlier").write_bytes(b"tactics")
    engine = made(tmp_path, "float", "fp32", timing_cache=tmp_path / "earlier")
    assert (engine / TIMING_CACHE).read_bytes() == b"cache:tactics"
    trt.stale_cache = True
    engine = made(tmp_path, "float", "fp32", timing_cache=tmp_path / "earlier")
    assert (engine / TIMING_CACHE).read_bytes() == b"cache:", "of another device: an empty one instead"


def test_an_engine_runs(trt: FakeTensorRT, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    first, second = (generator.random((1, 3, *IMGSZ), dtype=np.float32) for _ in range(2))
    with TensorRTBackend(made(tmp_path, "qdq", "int8"), precision="int8") as backend:
        assert (backend.names, backend.imgsz, backend.batch, backend.precision) == (NAMES, IMGSZ, 1, "int8")
        assert np.allclose(backend(first), expected(first))
        assert backend.executed == "int8 (3 int8, 1 fp16; of 4 convolutions)"
        calls = [backend.bind(first), backend.bind(second)]
        output = backend._pointers["output0"][1]
        for call, images in zip([*calls, calls[0]], [first, second, first], strict=True):
            call()
            found = np.frombuffer(bytes(trt.memory.blocks[output]), np.float32)
            assert np.allclose(found, expected(images).ravel()), "each bound call runs on its own images"
        assert np.allclose(backend(second), expected(second))
        with pytest.raises(ValueError, match=r"float32 \[1, 3, 32, 64\] expected"):
            backend(np.zeros((2, 3, *IMGSZ), np.float32))
    assert trt.memory.closed and not trt.memory.blocks, "device memory is given back"


def test_layers_are_timed_by_the_profiler(trt: FakeTensorRT, tmp_path: Path) -> None:
    with TensorRTBackend(made(tmp_path, "float", "fp32")) as backend:
        assert backend.node_ms(3) == {"/model.0/conv/Conv + PWN(/model.0/act/Mul)": 0.25, "Reformat": 0.125}


def test_nothing_is_deserialised_that_is_not_vouched_for(trt: FakeTensorRT, tmp_path: Path) -> None:
    engine = made(tmp_path, "float", "fp32")
    with pytest.raises(EngineError, match="holds fp32, int8 was asked"):
        TensorRTBackend(engine, precision="int8")
    with pytest.raises(EngineError, match="engine directories only"):
        TensorRTBackend(tmp_path / "model.onnx")
    sidecar = json.loads((engine / SIDECAR).read_text())
    (engine / SIDECAR).write_text(json.dumps({**sidecar, "library": "9.9.9"}))
    with pytest.raises(EngineError, match=r"built with TensorRT 9\.9\.9"):
        TensorRTBackend(engine)
    (engine / SIDECAR).write_text(json.dumps(sidecar))
    plan = (engine / ENGINE_FILE).read_bytes()
    (engine / ENGINE_FILE).write_bytes(plan.replace(b"1", b"2"))
    with pytest.raises(EngineError, match="altered"):
        TensorRTBackend(engine)
    assert trt.deserialised == 0
    (engine / ENGINE_FILE).write_bytes(plan)
    trt.load = False
    with pytest.raises(EngineError, match="cannot load it"):
        TensorRTBackend(engine)
    assert trt.deserialised == 1 and trt.memory.closed, "a failed start gives device memory back"


# ---- without a driver


def test_the_driver_is_probed_before_the_library_is_touched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    untouchable = ModuleType("tensorrt")  # without a driver, its Runtime is a null pointer: a use would end the process
    monkeypatch.setitem(sys.modules, "tensorrt", untouchable)
    monkeypatch.setattr(cuda, "DRIVER_LIBRARY", "libno-such-driver.so.1")
    assert "no CUDA driver" in (TensorRTBackend.probe() or "") and "install NVIDIA's driver" in (
        TensorRTBackend.probe() or ""
    )
    with pytest.raises(RuntimeUnavailable, match="no CUDA driver"):
        TensorRTBackend(tmp_path)


@pytest.mark.parametrize(
    ("init", "count", "words"),
    [(100, 0, "cuInit returned 100"), (0, 0, "sees no device"), (0, 1, None)],
)
def test_the_drivers_answers_are_read(
    init: int, count: int, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def devices(reference: Any) -> int:
        reference._obj.value = count
        return 0

    driver = SimpleNamespace(cuInit=lambda flags: init, cuDeviceGetCount=devices)
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: driver)
    problem = cuda.driver_problem()
    assert problem is None if words is None else words in (problem or "")


def test_memory_from_cuda_python_is_freed_and_its_errors_speak(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    held = [0x1000, 0x2000]

    def note(name: str, *answer: Any) -> Any:
        def call(*arguments: Any) -> tuple[Any, ...]:
            calls.append((name, *arguments))
            return answer

        return call

    runtime = SimpleNamespace(
        cudaStreamCreate=note("create", 0, 5),
        cudaMalloc=lambda size: (0, held.pop(0)) if held else (2, None),
        cudaMemcpyAsync=note("copy", 0),
        cudaStreamSynchronize=note("wait", 0),
        cudaFree=note("free", 0),
        cudaStreamDestroy=note("destroy", 0),
        cudaGetErrorString=lambda code: (0, b"out of memory"),
        cudaMemcpyKind=SimpleNamespace(cudaMemcpyHostToDevice="up", cudaMemcpyDeviceToHost="down"),
    )
    bindings = ModuleType("cuda.bindings")
    bindings.runtime = runtime  # type: ignore[attr-defined]
    package = ModuleType("cuda")
    package.bindings = bindings  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", package)
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    memory = cuda.open_memory()
    host = np.zeros(4, np.float32)
    first, second = memory.alloc(16), memory.alloc(16)
    with pytest.raises(RuntimeError, match="out of memory"):
        memory.alloc(16)
    memory.to_device(first, host)
    memory.to_host(host, second)
    memory.synchronize()
    memory.close()
    memory.close()
    assert calls == [
        ("create",),
        ("copy", 0x1000, host.ctypes.data, 16, "up", 5),
        ("copy", host.ctypes.data, 0x2000, 16, "down", 5),
        ("wait", 5),
        ("free", 0x2000),
        ("free", 0x1000),
        ("destroy", 5),
    ]


def test_without_cuda_memory_the_hint_names_both_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "pycuda"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in [name for name in sys.modules if name.startswith(("cuda.", "pycuda."))]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(RuntimeUnavailable, match="cuda-python.*or pycuda"):
        cuda.open_memory()


# ---- reports of the inspector


@pytest.mark.parametrize(
    ("described", "arithmetic"),
    [
        ({"Format/Datatype": "Row major linear FP32"}, "fp32"),
        ({"Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}, "int8"),
        ({"Format": "NHWC", "DataType": "BFloat16"}, "bf16"),
        ({"Format": "NHWC", "DataType": "Half"}, "fp16"),
        ({"Format": "NHWC", "Datatype": "Float"}, "fp32"),
        ({"Format": "NHWC", "DataType": "FP8"}, "fp8"),
    ],
)
def test_types_of_convolutions_are_read_in_either_form(described: dict[str, str], arithmetic: str) -> None:
    layer = {"LayerType": "CaskConvolution", "Inputs": [described]}
    assert convolution_types([layer, {**layer, "LayerType": "Reformat"}, "name only"]) == {arithmetic: 1}


def test_the_code_names_nothing_of_tensorrt_dynamically() -> None:
    """`getattr(trt..., name)` would escape the stand-in's check, but for the flags that are gated by hasattr."""
    for name in ("tensorrt.py", "tensorrt_build.py"):
        tree = ast.parse((ROOT / "yolo_compress" / "runtime" / name).read_text())
        found = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr"]
        assert [ast.unparse(call) for call in found] in ([], ["getattr(trt.BuilderFlag, flag)"])
