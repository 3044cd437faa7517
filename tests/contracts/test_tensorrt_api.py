"""TensorRT: every name that we use exists in the real bindings of each version, and the calls have the right order.

A stand-in module is made from each `api-*.json`, which has the names of NVIDIA's wheel. A name that the version does not have
is an AttributeError, as on the robot. The calls behave as NVIDIA documents them. TensorRT itself does not run here.
"""

from __future__ import annotations

import ast
import enum
import json
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support.given import GIVEN
from yolo_compress.runtime.backends.base import SIDECAR
from yolo_compress.runtime.backends.tensorrt import cuda
from yolo_compress.runtime.backends.tensorrt.build import TIMING_CACHE, build
from yolo_compress.runtime.backends.tensorrt.run import ENGINE_FILE, GRAPH_VARIABLE, TensorRTBackend, convolution_types
from yolo_compress.runtime.commands import build as robot_build
from yolo_compress.runtime.errors import CudaError, EngineError, RuntimeUnavailable
from yolo_compress.runtime.files import sha256_file

ROOT = Path(__file__).resolve().parents[2]
FOLDER = GIVEN.get("YOLO_COMPRESS_TENSORRT_APIS")
APIS = sorted(Path(FOLDER).glob("api-*.json")) if FOLDER else []
NAMES, IMGSZ, ANCHORS = ("bolt", "nut"), (32, 64), 5

pytestmark = pytest.mark.real


# ---- the stand-in


class Dims(list):
    """Stand-in for tensorrt.Dims: it can be indexed, sliced and iterated, and is not equal to a tuple."""


class HostMemory:
    def __init__(self, content: bytes) -> None:
        self._content = content

    def __bytes__(self) -> bytes:
        return self._content


class Member(enum.Enum):
    """Stand-in for pybind11's enumerations: `int(member)` works, arithmetic with a member does not."""

    def __int__(self) -> int:
        return int(self.value)


def strict(name: str, allowed: list[str], /, **behaviour: Any) -> Any:
    """Return an object that has only the names of the version. A name without behaviour is a plain attribute."""

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
    """Host and device memory in dicts. A copy out of bounds is an error, and in a graph a copy of memory that is not pinned.

    Work is done at once, or recorded for a graph during `capture`. `trace` has the calls in their order.
    """

    stream = 77

    def __init__(self) -> None:
        self.blocks: dict[int, bytearray] = {}
        self.hosts: dict[int, np.ndarray] = {}
        self.graphs: list[list[tuple[Callable[[], Any], set[int]]]] = []
        self.kept: list[tuple[Callable[[], Any], set[int]]] | None = None
        self.no_graphs: str | None = None  # reason why a capture fails
        self.trace: list[str] = []
        self.made = 0
        self.closed = False

    def did(self, *names: str) -> int:
        return sum(self.trace.count(name) for name in names)

    def put(self, work: Callable[[], Any], *addresses: int) -> None:
        """Put work on the stream."""
        if self.kept is None:
            work()
        else:
            self.kept.append((work, set(addresses)))

    def unused(self, address: int) -> bool:
        return not any(address in addresses for graph in self.graphs for _, addresses in graph)

    def alloc(self, size: int) -> int:
        assert self.kept is None and size > 0
        self.made += 1
        self.blocks[4096 * self.made] = bytearray(size)
        return 4096 * self.made

    def free(self, pointer: int) -> None:
        assert self.unused(pointer), "a graph uses the address"
        self.trace.append("free")
        del self.blocks[pointer]

    def pinned(self, count: int) -> np.ndarray:
        assert self.kept is None
        host = np.full(count, np.nan, np.float32)
        self.hosts[host.ctypes.data] = host
        return host

    def unpin(self, host: np.ndarray) -> None:
        assert self.unused(host.ctypes.data), "a graph uses the address"
        self.trace.append("unpin")
        del self.hosts[host.ctypes.data]

    def to_device(self, pointer: int, host: np.ndarray) -> None:
        assert host.nbytes <= len(self.blocks[pointer]) and host.flags.c_contiguous
        assert self.kept is None or host.ctypes.data in self.hosts
        self.trace.append("up")

        def copy() -> None:
            self.blocks[pointer][: host.nbytes] = host.tobytes()

        self.put(copy, pointer, host.ctypes.data)

    def to_host(self, host: np.ndarray, pointer: int) -> None:
        assert host.nbytes <= len(self.blocks[pointer]) and host.ctypes.data in self.hosts
        self.trace.append("down")

        def copy() -> None:
            host[...] = np.frombuffer(bytes(self.blocks[pointer][: host.nbytes]), np.float32).reshape(host.shape)

        self.put(copy, pointer, host.ctypes.data)

    def synchronize(self) -> None:
        assert not self.closed and self.kept is None
        self.trace.append("wait")

    def capture(self, work: Callable[[], None]) -> Any:
        self.trace.append("begin")
        if self.no_graphs is not None:
            raise CudaError(self.no_graphs)
        self.kept = []
        try:
            work()
            graph = self.kept
        finally:
            self.kept = None
            self.trace.append("end")
        self.graphs.append(graph)
        return graph

    def launch(self, graph: Any) -> None:
        assert any(graph is held for held in self.graphs)
        self.trace.append("launch")
        for work, _ in graph:
            work()

    def forget(self, graph: Any) -> None:
        self.trace.append("forget")
        self.graphs = [held for held in self.graphs if held is not graph]

    def close(self) -> None:
        if not self.closed:
            self.trace.append("close")
            assert not self.graphs and not self.hosts, "graphs or host memory were not released"
        self.blocks.clear()
        self.closed = True


class FakeTensorRT(ModuleType):
    """One version of TensorRT. Its "ONNX file" is a text with words: `half`, `qdq`, `dynamic`, `free` (dynamic size), `broken`, ..."""

    def __init__(self, api: dict[str, Any], memory: FakeMemory) -> None:
        super().__init__("tensorrt")
        self.api, self.memory = api, memory
        self.__version__ = api["__version__"]
        self.built: dict[str, Any] = {}
        self.deserialised = 0
        self.channels = 3  # of the model's input
        self.load = True
        self.capturable = True
        self.log_of_start: str | None = None  # log line when a Runtime is made
        self.stale_cache = False
        self.parts: dict[str, Any] = {
            "Builder": self._builder,
            "Runtime": self._runtime,
            "OnnxParser": self._parser,
            "Logger": self._logger_class(),
            "ILogger": type("ILogger", (), {}),
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

        for level in ("INTERNAL_ERROR", "WARNING", "ERROR", "VERBOSE", "INFO"):
            assert level in self.api["Logger"]
            setattr(made, level, level)
        return made

    # -- building

    def _builder(self, logger: Any) -> Any:
        self.logger = logger
        if self.log_of_start is not None:
            logger.log("ERROR", self.log_of_start)
            raise TypeError("pybind11::init(): factory function returned nullptr")
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
            "sharing": major(self) >= 10,  # several contexts may share a profile
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
            words = content[len(DOC_STRING) + 1 :].decode().split()
            self.built["words"] = words
            self.built["layers"].append(self._layer("CONVOLUTION", "HALF" if "half" in words else "FLOAT"))
            if "qdq" in words:
                self.built["layers"].append(self._layer("QUANTIZE", "INT8"))
            batch, width = -1 if "dynamic" in words else 1, -1 if "free" in words else IMGSZ[1]
            source = self.strict("ITensor", name="images", shape=Dims([batch, self.channels, IMGSZ[0], width]))
            allowed = {"get_layer": lambda index: self.built["layers"][index], "get_input": lambda index: source}
            for name, value in {**allowed, "num_layers": len(self.built["layers"])}.items():
                setattr(network, name, value)
            return "broken" not in words

        return self.strict("OnnxParser", parse=parse, num_errors=1, get_error=lambda index: error)

    def _config(self) -> Any:
        built = self.built

        def create_cache(content: bytes) -> Any:
            return self.strict("ITimingCache", serialize=lambda: HostMemory(content))

        def set_cache(cache: Any, ignore_mismatch: bool) -> bool:
            assert ignore_mismatch is False
            content = bytes(cache.serialize())
            if self.stale_cache and content:
                return False
            built["cache"] = content  # the config has a copy; the given cache is unchanged
            return True

        def get_cache() -> Any:
            assert "built" in built, "before the build there is nothing new in it"
            return create_cache(b"cache:" + built["cache"])

        def set_preview(feature: Any, on: bool) -> None:
            built["sharing"] = on and feature is self.PreviewFeature.PROFILE_SHARING_0806

        def add_profile(profile: Any) -> int:
            smallest, _, largest = built["profile"]
            built["profiles"] += smallest <= largest
            return built["profiles"] - 1

        def flag(action: Any) -> Any:
            return lambda member: action(member.name)

        config = self.strict(
            "IBuilderConfig",
            set_flag=flag(built["flags"].add),
            clear_flag=flag(built["flags"].discard),
            set_memory_pool_limit=lambda pool, size: built.update(pool=(pool.name, size)),
            create_timing_cache=create_cache,
            set_timing_cache=set_cache,
            get_timing_cache=get_cache,
            get_preview_feature=lambda feature: built["sharing"],
            set_preview_feature=set_preview,
            add_optimization_profile=add_profile,
        )
        built["config"] = config
        return config

    def _build(self, network: Any, config: Any) -> Any:
        assert network is self.built["network"] and config is self.built["config"]
        assert config.profiling_verbosity == self.ProfilingVerbosity.DETAILED
        if "unbuildable" in self.built["words"]:
            self.logger.log("WARNING", "a hint")
            self.logger.log("ERROR", "Could not find any implementation for node Moebius")
            return None
        self.built["built"] = True
        dynamic = "dynamic" in self.built["words"]
        if dynamic:
            assert self.built["profiles"] == 1, "TensorRT refuses a dynamic network without a profile"
        largest = self.built["profile"][2][0] if dynamic else 1
        plan = {"batch": -1 if dynamic else 1, "largest": largest, "sharing": self.built["sharing"]}
        return HostMemory(json.dumps(plan).encode())

    # -- running

    def _runtime(self, logger: Any) -> Any:
        self.logger = logger
        if self.log_of_start is not None:
            logger.log("ERROR", self.log_of_start)
            return strict("Runtime", [])  # a null pointer: its first use would end the process
        return self._traced("runtime", self.strict("Runtime", deserialize_cuda_engine=self._engine))

    def _traced(self, name: str, made: Any) -> Any:
        """Return the object, and add its deletion to the trace."""
        weakref.finalize(made, self.memory.trace.append, name)
        return made

    def _engine(self, plan: bytes) -> Any:
        self.deserialised += 1
        if not self.load:
            self.logger.log("ERROR", "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (of sm_90)")
            return None
        described = json.loads(plan)
        batch = described["batch"]
        shapes = {"images": Dims([batch, self.channels, *IMGSZ]), "output0": Dims([batch, 4 + len(NAMES), ANCHORS])}
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

        return self._traced(
            "engine",
            self.strict(
                "ICudaEngine",
                num_io_tensors=2,
                get_tensor_name=lambda index: tensors[index],
                get_tensor_mode=modes.__getitem__,
                get_tensor_dtype=lambda name: self.DataType.FLOAT,
                get_tensor_shape=shapes.__getitem__,
                create_execution_context=lambda: self._context(described),
                create_engine_inspector=lambda: self.strict("EngineInspector", get_engine_information=inspect),
            ),
        )

    def _context(self, described: dict[str, Any]) -> Any:
        """Return a context. A graph has its state, so a launch after a change is an error. The first run cannot be captured."""
        state: dict[str, Any] = {"address": {}, "version": 0, "flushed": None}
        described["contexts"] = described.get("contexts", 0) + 1
        first = described["contexts"] == 1
        own: list[Any] = []

        def set_shape(name: str, shape: Any) -> bool:
            assert name == "images"
            state["version"] += 1
            free = first or described["batch"] > 0 or described["sharing"]
            fits = free and 1 <= shape[0] <= described["largest"]
            state["shape"] = tuple(shape) if fits else None
            return bool(fits)

        def set_address(name: str, pointer: int) -> bool:
            assert pointer in self.memory.blocks
            state["version"] += 1
            state["address"][name] = pointer
            return True

        def get_shape(name: str) -> Dims:
            return Dims([state["shape"][0], 4 + len(NAMES), ANCHORS])

        def compute(shape: tuple[int, ...], version: int) -> None:
            assert version == state["version"], "the context changed since the graph was captured"
            size = 4 * int(np.prod(shape))
            block = self.memory.blocks[state["address"]["images"]][:size]
            output = expected(np.frombuffer(bytes(block), np.float32).reshape(shape))
            target = self.memory.blocks[state["address"]["output0"]]
            assert output.nbytes <= len(target)
            target[: output.nbytes] = output.tobytes()
            if (profiler := own[0]().profiler) is not None:
                for layer, ms in (("/model.0/conv/Conv + PWN(/model.0/act/Mul)", 0.25), ("Reformat", 0.125)):
                    profiler.report_layer_time(layer, ms)

        def execute(stream: int) -> bool:
            assert stream == FakeMemory.stream
            self.memory.trace.append("run")
            shape, version = state["shape"], state["version"]
            if self.memory.kept is not None and not (self.capturable and state["flushed"] == version):
                self.logger.log("ERROR", "operation not permitted when stream is capturing")
                return False
            state["flushed"] = version
            self.memory.put(lambda: compute(shape, version), *state["address"].values())
            return True

        context = self.strict(
            "IExecutionContext",
            profiler=None,
            set_input_shape=set_shape,
            get_tensor_shape=get_shape,
            set_tensor_address=set_address,
            execute_async_v3=execute,
        )
        own.append(weakref.ref(context))
        return self._traced("context", context)


def expected(images: np.ndarray) -> np.ndarray:
    """Return the output of the stand-in's model: the mean of the image plus the number of the row."""
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
    monkeypatch.setattr(cuda, "device_name", lambda: "Orin (sm_87)")
    monkeypatch.delenv(GRAPH_VARIABLE, raising=False)
    return fake


DOC_STRING = b"\x32"  # tag of ModelProto.doc_string


def major(trt: FakeTensorRT) -> int:
    return int(trt.__version__.split(".")[0])


def made(folder: Path, words: str, precision: str, **options: Any) -> Path:
    (folder / "model.onnx").write_bytes(DOC_STRING + bytes([len(words)]) + words.encode())
    files = build(folder / "model.onnx", folder / "engine", precision, NAMES, IMGSZ, **options)
    assert set(files) == {ENGINE_FILE, TIMING_CACHE, SIDECAR} == {p.name for p in (folder / "engine").iterdir()}
    return folder / "engine"


# ---- the contract


def test_the_range_of_versions_is_covered() -> None:
    versions = {path.stem[len("api-") :] for path in APIS}
    assert {version.split(".")[0] for version in versions} == {"8", "10", "11"}, f"YOLO_COMPRESS_TENSORRT_APIS={FOLDER}"


def test_the_stand_in_has_only_the_names_of_its_version(trt: FakeTensorRT) -> None:
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
    # in TensorRT 11, the types in the graph set the precision
    wanted = {"SPARSE_WEIGHTS"} | (flags if major(trt) < 11 else set())
    assert trt.built["flags"] - {"TF32"} == wanted
    assert ("TF32" in trt.built["flags"]) == (precision != "fp32"), "fp32 is FP32"
    assert trt.built["network_flags"] == ({"EXPLICIT_BATCH"} if major(trt) < 11 else set())
    assert trt.built["pool"] == ("WORKSPACE", 512 << 20) and trt.built["profiles"] == 0
    sidecar = json.loads((engine / SIDECAR).read_text())
    assert (sidecar["runtime"], sidecar["library"], sidecar["precision"]) == ("tensorrt", trt.__version__, precision)
    assert sidecar["options"] == {"max_batch": 1, "workspace_mib": 512} and sidecar["built_on"]["gpu"] == "Orin (sm_87)"


def test_a_graph_without_the_types_of_the_precision_is_refused(trt: FakeTensorRT, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no Q/DQ nodes"):
        made(tmp_path, "float", "int8")
    if major(trt) >= 11:
        with pytest.raises(EngineError, match="takes the precision from the graph"):
            made(tmp_path, "float", "fp16")
    else:
        made(tmp_path, "float", "fp16")
        assert trt.built["flags"] >= {"FP16"}


def test_failures_of_parser_and_builder_are_in_the_error(trt: FakeTensorRT, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"cannot parse it: node 7: no importer for Moebius"):
        made(tmp_path, "broken", "fp32")
    with pytest.raises(EngineError, match="built no fp32 engine: Could not find any implementation for node Moebius"):
        made(tmp_path, "unbuildable", "fp32")
    with pytest.raises(EngineError, match="takes no batch from 1 to 0"):
        made(tmp_path, "dynamic", "fp32", max_batch=0)
    with pytest.raises(EngineError, match="max_batch=4, but its batch is fixed at 1"):
        made(tmp_path, "float", "fp32", max_batch=4)
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
        assert np.allclose(backend(images), expected(images)), "usable after a refusal"
        calls = [backend.bind(images[:count]) for count in (1, 2)]  # contexts of one profile
        calls[0]()
        assert backend.executed.endswith(", CUDA graph")
    with pytest.raises(EngineError, match="only the batch may be dynamic"):
        made(tmp_path, "free", "fp32")


def test_a_timing_cache_is_used_or_replaced(trt: FakeTensorRT, tmp_path: Path) -> None:
    (tmp_path / "earlier").write_bytes(b"tactics")
    engine = made(tmp_path, "float", "fp32", timing_cache=tmp_path / "earlier")
    assert (engine / TIMING_CACHE).read_bytes() == b"cache:tactics", "what the build added, not what it was given"
    trt.stale_cache = True
    engine = made(tmp_path, "float", "fp32", timing_cache=tmp_path / "earlier")
    assert (engine / TIMING_CACHE).read_bytes() == b"cache:", "of another device: an empty one instead"


def test_an_engine_runs(trt: FakeTensorRT, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    first, second = (generator.random((1, 3, *IMGSZ), dtype=np.float32) for _ in range(2))
    with TensorRTBackend(made(tmp_path, "qdq", "int8"), precision="int8") as backend:
        assert (backend.names, backend.imgsz, backend.batch, backend.precision) == (NAMES, IMGSZ, 1, "int8")
        assert np.allclose(backend(first), expected(first))
        assert backend.executed == "int8 (3 int8, 1 fp16; of 4 convolutions), CUDA graph"
        calls = [backend.bind(first), backend.bind(second)]
        for call, images in zip([*calls, calls[0]], [first, second, first], strict=True):
            call()
            found = np.frombuffer(bytes(trt.memory.blocks[call.result.pointer]), np.float32)  # type: ignore[attr-defined]
            assert np.allclose(found, expected(images).ravel()), "each bound call runs on its own images"
        assert np.allclose(backend(second), expected(second))
        with pytest.raises(ValueError, match=r"expected float32 \[1, 3, 32, 64\]"):
            backend(np.zeros((2, 3, *IMGSZ), np.float32))
    assert trt.memory.closed and not trt.memory.blocks, "device memory is given back"


def test_an_engine_of_grey_images_runs_and_one_of_four_channels_is_refused(trt: FakeTensorRT, tmp_path: Path) -> None:
    trt.channels = 1
    images = np.random.default_rng(0).random((1, 1, *IMGSZ), dtype=np.float32)
    with TensorRTBackend(made(tmp_path, "", "fp32")) as backend:
        assert backend.channels == 1 and np.allclose(backend(images), expected(images))
        with pytest.raises(ValueError, match=r"expected float32 \[1, 1, 32, 64\]"):
            backend(np.zeros((1, 3, *IMGSZ), np.float32))
    trt.channels = 4
    with pytest.raises(EngineError, match="takes images of 4 channels"):
        TensorRTBackend(made(tmp_path, "", "fp32"))


# ---- CUDA graphs


def inputs(*counts: int) -> list[np.ndarray]:
    generator = np.random.default_rng(3)
    return [generator.random((count, 3, *IMGSZ), dtype=np.float32) for count in counts]


def test_a_graph_is_captured_once_after_a_plain_run_and_then_launched(trt: FakeTensorRT, tmp_path: Path) -> None:
    engine = made(tmp_path, "half", "fp16")
    with TensorRTBackend(engine) as backend:
        opened = ["up", "run", "down", "wait", "begin", "up", "run", "down", "end", "launch", "wait"]
        assert trt.memory.trace == opened
        outputs = [(images, backend(images)) for images in inputs(*[1] * 5)]
        assert trt.memory.trace[len(opened) :] == ["launch", "wait"] * 5, "TensorRT is not asked again"
        for images, output in outputs:  # kept beyond the next call
            assert np.allclose(output, expected(images))
        (images,) = inputs(1)
        lent = backend(images, copy=False)
        assert lent.ctypes.data in trt.memory.hosts and np.allclose(lent, expected(images))
        call = backend.bind(images)
        before = len(trt.memory.trace)
        for _ in range(3):
            call()
        assert trt.memory.trace[before:] == ["launch", "wait"] * 3, "latency is of the graph alone, without copies"


def test_another_shape_ends_the_graph_and_a_second_run_of_it_is_captured_anew(
    trt: FakeTensorRT, tmp_path: Path
) -> None:
    with TensorRTBackend(made(tmp_path, "dynamic", "fp32", max_batch=4)) as backend:
        trace = trt.memory.trace
        for count, did in (
            (4, ["forget", "free", "unpin", "free", "unpin", "up", "run", "down", "wait"]),
            (4, ["begin", "up", "run", "down", "end", "launch", "wait"]),
            (4, ["launch", "wait"]),
            (2, ["forget", "up", "run", "down", "wait"]),  # the buffers of 4 hold 2
            (3, ["up", "run", "down", "wait"]),  # alternating shapes never pay for a capture
            (2, ["up", "run", "down", "wait"]),
            (2, ["begin", "up", "run", "down", "end", "launch", "wait"]),
        ):
            before = len(trace)
            (images,) = inputs(count)
            assert np.allclose(backend(images), expected(images))
            assert trace[before:] == did
        assert len(trt.memory.blocks) == 2 and len(trt.memory.hosts) == 2, "what was outgrown is freed"


@pytest.mark.parametrize("failure", ["begin", "enqueue"])
def test_without_a_graph_the_reason_is_reported_and_runs_are_plain(
    failure: str, trt: FakeTensorRT, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if failure == "begin":
        trt.memory.no_graphs = "pycuda cannot capture a stream; cuda-python can"
    trt.capturable = failure == "begin"
    reason = "pycuda cannot capture" if failure == "begin" else "could not enqueue an inference"
    with TensorRTBackend(made(tmp_path, "qdq", "int8")) as backend:
        assert backend.executed.startswith("int8 (3 int8, 1 fp16; of 4 convolutions), no CUDA graph: ")
        assert reason in backend.executed
        assert reason in capsys.readouterr().err, "for those who do not look at `executed`"
        before = len(trt.memory.trace)
        for images in inputs(1, 1):
            assert np.allclose(backend(images), expected(images))
        assert trt.memory.trace[before:] == ["up", "run", "down", "wait"] * 2, "and it is not tried again"
        begun = trt.memory.did("begin")
        backend.bind(images)()
        assert trt.memory.did("begin") == begun == 1 and trt.memory.did("launch") == 0
        assert "CUDA graph" not in capsys.readouterr().err


def test_a_missing_graph_of_a_bound_call_is_reported_too(trt: FakeTensorRT, tmp_path: Path) -> None:
    with TensorRTBackend(made(tmp_path, "float", "fp32")) as backend:
        assert backend.executed.endswith(", CUDA graph")
        trt.memory.no_graphs = "CUDA: out of memory (code 2)"
        backend.bind(inputs(1)[0])()
        assert backend.executed.endswith("no CUDA graph: CUDA: out of memory (code 2)")


def test_graphs_are_turned_off_by_argument_and_by_environment(
    trt: FakeTensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = made(tmp_path, "float", "fp32")
    monkeypatch.setenv(GRAPH_VARIABLE, "0")
    with TensorRTBackend(engine) as backend:
        assert backend.executed.endswith(", no CUDA graph: turned off") and trt.memory.trace == []
        (images,) = inputs(1)
        for _ in range(3):
            assert np.allclose(backend(images), expected(images))
        assert trt.memory.did("begin", "launch") == 0 and trt.memory.did("run") == 3
    assert capsys.readouterr().err == ""
    for asked, said in ((True, "0"), (None, "1"), (True, "")):
        trt.memory.closed = False
        monkeypatch.setenv(GRAPH_VARIABLE, said)
        with TensorRTBackend(engine, cuda_graph=asked) as backend:
            assert backend.executed.endswith(", CUDA graph")
    trt.memory.closed = False
    with TensorRTBackend(engine, cuda_graph=False) as backend:
        assert backend.executed.endswith("turned off")
    monkeypatch.setenv(GRAPH_VARIABLE, "yes")
    with pytest.raises(EngineError, match="YOLO_COMPRESS_CUDA_GRAPH=yes: 0 or 1 expected"):
        TensorRTBackend(engine)


def test_everything_is_released_in_order(trt: FakeTensorRT, tmp_path: Path) -> None:
    backend = TensorRTBackend(made(tmp_path, "float", "fp32"))
    call = backend.bind(inputs(1)[0])
    before = len(trt.memory.trace)
    backend.close()
    bound = ["forget", "context", "free", "free"]
    main = ["forget", "context", "free", "unpin", "free", "unpin"]
    assert trt.memory.trace[before:] == ["wait", *bound, *main, "engine", "runtime", "close"]
    backend.close()
    assert trt.memory.trace.count("close") == 1
    with pytest.raises(AttributeError):
        call()  # its context is gone


def test_layers_are_timed_by_the_profiler(trt: FakeTensorRT, tmp_path: Path) -> None:
    with TensorRTBackend(made(tmp_path, "float", "fp32")) as backend:
        assert backend.node_ms(3) == {"/model.0/conv/Conv + PWN(/model.0/act/Mul)": 0.25, "Reformat": 0.125}
        assert trt.memory.did("begin") == 1 and trt.memory.trace[-3:] == ["context", "free", "free"], (
            "and left no trace"
        )
        assert backend.executed.endswith(", CUDA graph"), "the profiler was on another context"


@pytest.mark.fault(30)
def test_only_verified_files_are_deserialised(trt: FakeTensorRT, tmp_path: Path) -> None:
    engine = made(tmp_path, "float", "fp32")
    with pytest.raises(EngineError, match="holds fp32, expected int8"):
        TensorRTBackend(engine, precision="int8")
    with pytest.raises(EngineError, match="engine directories only"):
        TensorRTBackend(tmp_path / "model.onnx")
    sidecar = json.loads((engine / SIDECAR).read_text())
    (engine / SIDECAR).write_text(json.dumps({**sidecar, "library": "9.9.9"}))
    with pytest.raises(EngineError, match=r"built with TensorRT 9\.9\.9"):
        TensorRTBackend(engine)
    (engine / SIDECAR).write_text(json.dumps({**sidecar, "built_on": {"gpu": "NVIDIA H100 PCIe (sm_90)"}}))
    with pytest.raises(EngineError, match=r"built on NVIDIA H100 PCIe \(sm_90\), here is Orin \(sm_87\)"):
        TensorRTBackend(engine)
    (engine / SIDECAR).write_text(json.dumps(sidecar))
    plan = (engine / ENGINE_FILE).read_bytes()
    (engine / ENGINE_FILE).write_bytes(plan.replace(b"1", b"2"))
    with pytest.raises(EngineError, match="altered"):
        TensorRTBackend(engine)
    assert trt.deserialised == 0
    (engine / ENGINE_FILE).write_bytes(plan)
    trt.load = False
    with pytest.raises(EngineError, match=r"cannot load it.*: Error Code 1: Serialization \(of sm_90\)"):
        TensorRTBackend(engine)
    assert trt.deserialised == 1 and trt.memory.closed, "a failed start gives device memory back"


@pytest.mark.fault(30)
def test_an_engine_of_another_gpu_is_built_again_on_the_robot(
    trt: FakeTensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = made(tmp_path, "float", "fp32")
    (engine / robot_build.BUILT).write_text(json.dumps({"library": trt.__version__}))
    bundle: Any = SimpleNamespace(
        pinned=False, onnx={"fp32": "model.onnx"}, onnx_sha256=lambda stem: sha256_file(tmp_path / "model.onnx")
    )
    ready = robot_build._up_to_date(engine, bundle, ["fp32"], "tensorrt", int8_images=False)
    assert ready is not None and ready["library"] == trt.__version__
    monkeypatch.setattr(cuda, "device_name", lambda: "Thor (sm_110)")
    assert robot_build._up_to_date(engine, bundle, ["fp32"], "tensorrt", int8_images=False) is None


# ---- without a driver


@pytest.mark.fault(62)
def test_the_driver_is_probed_before_the_library_is_touched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    untouchable = ModuleType("tensorrt")  # without a driver, its Runtime is a null pointer: a use would end the process
    monkeypatch.setitem(sys.modules, "tensorrt", untouchable)
    monkeypatch.setattr(cuda, "DRIVER_LIBRARY", "libno-such-driver.so.1")
    assert "no CUDA driver" in (TensorRTBackend.probe() or "") and "install NVIDIA's driver" in (
        TensorRTBackend.probe() or ""
    )
    with pytest.raises(RuntimeUnavailable, match="no CUDA driver"):
        TensorRTBackend(tmp_path)


def test_a_release_that_cannot_build_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = ModuleType("tensorrt")
    broken.__version__ = "10.2.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", broken)
    monkeypatch.setattr(cuda, "driver_problem", lambda: None)
    assert "TensorRT 10.2.0 cannot build" in (TensorRTBackend.probe() or "")


@pytest.mark.fault(62)
def test_a_driver_that_is_too_old_is_an_error_and_not_a_crash(trt: FakeTensorRT, tmp_path: Path) -> None:
    engine = made(tmp_path, "float", "fp32")
    trt.log_of_start = "createInferRuntime: Error Code 6: API Usage Error (CUDA initialization failure with error: 35)"
    with pytest.raises(
        RuntimeUnavailable, match=r"does not start .*failure with error: 35.*update NVIDIA's driver"
    ) as caught:
        TensorRTBackend(engine)
    assert caught.value.exit_code == 4 and trt.deserialised == 0 and trt.memory.closed
    with pytest.raises(RuntimeUnavailable, match="does not start.*failure with error: 35"):
        made(tmp_path, "float", "fp32")


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
    """The stand-in cannot check `getattr(trt..., name)`. Only flags that are tested with hasattr may use it."""
    files = sorted((ROOT / "yolo_compress/runtime/backends/tensorrt").glob("*.py"))
    assert len(files) >= 5
    for file in files:
        tree = ast.parse(file.read_text())
        found = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr"]
        assert [ast.unparse(call) for call in found] in ([], ["getattr(trt.BuilderFlag, flag)"])
