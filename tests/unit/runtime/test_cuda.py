"""CUDA through cuda-python and pycuda, on stand-ins that have real memory and keep a graph's work for its launches.

Their functions and arguments are those recorded from cuda-python 11.8.7, 12.6.0, 12.9.10 and 13.5.0 and from the sources of
pycuda 2026.1: another name is an AttributeError, another number of arguments a TypeError.
"""

from __future__ import annotations

import ctypes
import enum
import inspect
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from yolo_compress.runtime.backends.tensorrt import cuda
from yolo_compress.runtime.errors import CudaError, RuntimeUnavailable

SIGNATURES = {
    "cudaStreamCreateWithFlags": "flags",
    "cudaStreamDestroy": "stream",
    "cudaStreamSynchronize": "stream",
    "cudaStreamBeginCapture": "stream, mode",
    "cudaStreamEndCapture": "stream",
    "cudaGraphInstantiateWithFlags": "graph, flags",
    "cudaGraphLaunch": "graphExec, stream",
    "cudaGraphExecDestroy": "graphExec",
    "cudaGraphDestroy": "graph",
    "cudaHostAlloc": "size, flags",
    "cudaFreeHost": "ptr",
    "cudaMalloc": "size",
    "cudaFree": "devPtr",
    "cudaMemcpyAsync": "dst, src, count, kind, stream",
    "cudaGetErrorString": "error",
    "cudaGetLastError": "",
}
INSTANTIATE = {"11.8.7": "graph, pLogBuffer, bufferSize", "12.6.0": "graph, flags"}  # the later ones as 12.6.0
MODULES = {"11.8.7": "cuda.bindings", "12.6.0": "cuda", "12.9.10": "cuda.bindings", "13.5.0": "cuda.bindings"}


class cudaError_t(enum.IntEnum):
    success, memory, insufficient, unsupported, invalidated = 0, 2, 35, 900, 901


class FakeRuntime:
    """`cuda.bindings.runtime`: each call notes its name; those of `fails` return that code."""

    def __init__(self, version: str) -> None:
        self.signatures = {**SIGNATURES, "cudaGraphInstantiate": INSTANTIATE.get(version, INSTANTIATE["12.6.0"])}
        self.calls: list[str] = []
        self.fails: dict[str, cudaError_t] = {}
        self.memory: dict[int, Any] = {}
        self.capturing: list[tuple[int, int, int]] | None = None
        self.graphs: dict[int, list[tuple[int, int, int]]] = {}
        self.cudaStreamNonBlocking, self.cudaHostAllocDefault = 1, 0
        self.cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
        self.cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __getattr__(self, name: str) -> Any:
        try:
            parameters = self.__dict__["signatures"][name]
        except KeyError:
            raise AttributeError(f"module 'cuda.bindings.runtime' has no attribute {name!r}") from None
        names = [part for part in parameters.split(", ") if part]
        signature = inspect.Signature(
            [inspect.Parameter(each, inspect.Parameter.POSITIONAL_OR_KEYWORD) for each in names]
        )

        def call(*arguments: Any) -> tuple[Any, ...]:
            bound = signature.bind(*arguments).arguments
            self.calls.append(name)
            code = self.fails.get(name, cudaError_t.success)
            value = self.does(name, **bound) if code == cudaError_t.success else None
            return (code,) if name in ONLY_A_CODE else (code, value)

        return call

    def does(self, name: str, **given: Any) -> Any:
        if name in ("cudaMalloc", "cudaHostAlloc"):
            block = ctypes.create_string_buffer(given["size"])
            self.memory[ctypes.addressof(block)] = block
            return ctypes.addressof(block)
        if name in ("cudaFree", "cudaFreeHost"):
            del self.memory[given.get("devPtr", given.get("ptr"))]
        elif name == "cudaMemcpyAsync":
            assert given["kind"] in (1, 2) and given["stream"] == 7
            copy = (given["dst"], given["src"], given["count"])
            if self.capturing is None:
                ctypes.memmove(*copy)
            else:
                self.capturing.append(copy)
        elif name == "cudaStreamCreateWithFlags":
            assert given["flags"] == 1, "a blocking stream's capture ends with the first use of the default stream"
            return 7
        elif name == "cudaStreamBeginCapture":
            assert given["mode"] == 1 and self.capturing is None
            self.capturing = []
        elif name == "cudaStreamEndCapture":
            captured, self.capturing = self.capturing, None
            self.graphs[len(self.calls)] = captured or []
            return len(self.calls)
        elif name == "cudaGraphInstantiateWithFlags":
            assert given["flags"] == 0
            self.graphs[-given["graph"]] = list(self.graphs[given["graph"]])
            return -given["graph"]
        elif name == "cudaGraphLaunch":
            for copy in self.graphs[given["graphExec"]]:
                ctypes.memmove(*copy)
        elif name in ("cudaGraphDestroy", "cudaGraphExecDestroy"):
            del self.graphs[given.get("graph", given.get("graphExec"))]
        elif name == "cudaGetErrorString":
            return given["error"].name.encode()
        return None


ONLY_A_CODE = {
    name for name in SIGNATURES if name.endswith(("Destroy", "Synchronize", "BeginCapture", "Launch", "Async"))
}
ONLY_A_CODE |= {"cudaFree", "cudaFreeHost", "cudaGetLastError"}


def installed(monkeypatch: pytest.MonkeyPatch, version: str) -> FakeRuntime:
    """That cuda-python, and nothing else, imports."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("cuda", "pycuda")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pycuda", None)
    runtime = FakeRuntime(version)
    package = ModuleType("cuda")
    monkeypatch.setitem(sys.modules, "cuda", package)
    if MODULES[version] == "cuda":
        package.cudart = runtime  # type: ignore[attr-defined]
    else:
        bindings = ModuleType("cuda.bindings")
        bindings.runtime = runtime  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    return runtime


@pytest.fixture(params=list(MODULES))
def runtime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    return installed(monkeypatch, request.param)


def there_and_back(memory: cuda.CudaMemory, count: int = 4) -> tuple[np.ndarray, np.ndarray, Callable[[], None]]:
    """Page-locked input and output, and a copy of one into the other over the device."""
    pointer, source, result = memory.alloc(4 * count), memory.pinned(count), memory.pinned(count)

    def work() -> None:
        memory.to_device(pointer, source)
        memory.to_host(result, pointer)

    return source, result, work


def test_a_graph_is_captured_once_and_launched_on_what_the_pinned_memory_then_holds(runtime: FakeRuntime) -> None:
    memory = cuda.open_memory()
    assert memory.stream == 7
    source, result, work = there_and_back(memory)
    assert source.dtype == np.float32 and source.shape == (4,)
    runtime.calls.clear()
    graph = memory.capture(work)
    assert runtime.calls == [
        "cudaStreamBeginCapture",
        "cudaMemcpyAsync",
        "cudaMemcpyAsync",
        "cudaStreamEndCapture",
        "cudaGraphInstantiateWithFlags",
        "cudaGraphDestroy",
    ]
    runtime.calls.clear()
    for value in range(5):
        source[...] = value
        memory.launch(graph)
        memory.synchronize()
        assert (result == value).all()
    assert runtime.calls == ["cudaGraphLaunch", "cudaStreamSynchronize"] * 5
    memory.close()
    assert not runtime.graphs and not runtime.memory


def test_all_is_released_in_order_and_once(runtime: FakeRuntime) -> None:
    memory = cuda.open_memory()
    source, result, work = there_and_back(memory)
    first, second = memory.capture(work), memory.capture(work)
    memory.forget(first)
    memory.unpin(result)
    memory.free(memory.alloc(8))
    runtime.calls.clear()
    memory.close()
    assert runtime.calls == [
        "cudaStreamSynchronize",
        "cudaGraphExecDestroy",
        "cudaFreeHost",
        "cudaFree",
        "cudaStreamDestroy",
    ]
    memory.close()
    assert len(runtime.calls) == 5 and not runtime.graphs and not runtime.memory
    assert first != second and source.size


def test_a_capture_that_fails_leaves_the_stream_usable_and_nothing_behind(runtime: FakeRuntime) -> None:
    memory = cuda.open_memory()
    source, result, work = there_and_back(memory)

    def enqueue() -> None:
        work()
        raise CudaError("TensorRT refuses")

    with pytest.raises(CudaError, match="TensorRT refuses"):
        memory.capture(enqueue)
    for name, code in (
        ("cudaStreamBeginCapture", cudaError_t.unsupported),
        ("cudaStreamEndCapture", cudaError_t.invalidated),
        ("cudaGraphInstantiateWithFlags", cudaError_t.memory),
    ):
        runtime.fails = {name: code}
        runtime.calls.clear()
        with pytest.raises(CudaError, match=rf"CUDA: {code.name} \(code {int(code)}\)"):
            memory.capture(work)
        assert ("cudaGetLastError" in runtime.calls) == (code is cudaError_t.invalidated), (
            "else the next call reports it"
        )
        runtime.fails, runtime.capturing = {}, None
    assert not runtime.graphs
    source[...] = 3
    work()
    assert (result == 3).all()
    memory.close()


def test_errors_speak_and_do_not_lose_memory(runtime: FakeRuntime) -> None:
    memory = cuda.open_memory()
    memory.alloc(16)
    runtime.fails = {"cudaMalloc": cudaError_t.memory, "cudaHostAlloc": cudaError_t.memory}
    for ask in (memory.alloc, memory.pinned):
        with pytest.raises(CudaError, match=r"CUDA: memory \(code 2\)") as caught:
            ask(16)
        assert caught.value.exit_code == 4
    memory.close()
    assert not runtime.memory


def test_without_cuda_memory_the_hint_names_both_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = installed(monkeypatch, "12.9.10")
    runtime.fails = {"cudaStreamCreateWithFlags": cudaError_t.insufficient}
    with pytest.raises(RuntimeUnavailable, match=r"CudaPython: CUDA: insufficient \(code 35\); PyCuda:.*or pycuda"):
        cuda.open_memory()
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.delitem(sys.modules, "cuda.bindings")
    with pytest.raises(RuntimeUnavailable, match=r"CudaPython: .*; PyCuda: .*cuda-python.*or pycuda"):
        cuda.open_memory()


# ---- pycuda


class FakePyCuda(ModuleType):
    """`pycuda.driver`: a stack of contexts a thread, as in its cuda.hpp; what needs one fails without."""

    def __init__(self) -> None:
        super().__init__("pycuda.driver")
        self.Error = type("Error", (Exception,), {})  # of no built-in family
        self.trace: list[str] = []
        self.stacks = threading.local()
        self.started = False
        self.memory: dict[int, Any] = {}
        self.broken: str | None = None

    def stack(self) -> list[Any]:
        """Of this thread."""
        if not hasattr(self.stacks, "contexts"):
            self.stacks.contexts = []
        return self.stacks.contexts

    def did(self, name: str, needs_context: bool = True) -> None:
        if name == self.broken or (needs_context and not self.stack()):
            raise self.Error(f"{name} failed: invalid device context")
        self.trace.append(name)

    def init(self) -> None:
        self.started = True
        self.did("init", needs_context=False)

    def Device(self, number: int) -> Any:
        assert number == 0 and self.started

        def push() -> None:
            self.did("push", needs_context=False)
            self.stack().append("primary")

        def pop() -> None:
            self.did("pop")
            self.stack().pop()

        return SimpleNamespace(retain_primary_context=lambda: SimpleNamespace(push=push, pop=pop))

    def Stream(self) -> Any:
        self.did("stream")
        return SimpleNamespace(handle=9, synchronize=lambda: self.did("wait"))

    def mem_alloc(self, size: int) -> Any:
        self.did("mem_alloc")
        block = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(block)] = block
        fake = self

        class DeviceAllocation:
            def __int__(self) -> int:
                return ctypes.addressof(block)

            def free(self) -> None:
                fake.did("free")
                del fake.memory[int(self)]

        return DeviceAllocation()

    def pagelocked_empty(self, shape: Any, dtype: Any) -> np.ndarray:
        self.did("pagelocked_empty")
        fake = self

        class Array(np.ndarray):
            base = property(lambda self: SimpleNamespace(free=lambda: fake.did("free_host")))  # type: ignore[assignment]

        return np.empty(shape, dtype).view(Array)

    def memcpy_htod_async(self, dest: int, src: np.ndarray, stream: Any) -> None:
        self.did("up")
        ctypes.memmove(dest, src.ctypes.data, src.nbytes)

    def memcpy_dtoh_async(self, dest: np.ndarray, src: int, stream: Any) -> None:
        self.did("down")
        ctypes.memmove(dest.ctypes.data, src, dest.nbytes)


@pytest.fixture
def pycuda(monkeypatch: pytest.MonkeyPatch) -> FakePyCuda:
    for name in [name for name in sys.modules if name.split(".")[0] in ("cuda", "pycuda")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cuda", None)
    driver, package = FakePyCuda(), ModuleType("pycuda")
    package.driver = driver  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)
    return driver


def test_pycuda_copies_without_graphs_and_releases_in_order(pycuda: FakePyCuda) -> None:
    memory = cuda.open_memory()
    assert isinstance(memory, cuda.PyCuda) and memory.stream == 9
    source, result, work = there_and_back(memory)
    source[...] = 5
    with pytest.raises(CudaError, match="pycuda cannot capture a stream; cuda-python can"):
        memory.capture(work)
    assert "up" not in pycuda.trace, "refused before anything is put on the stream"
    work()
    assert (result == 5).all()
    memory.unpin(result)
    pycuda.trace.clear()
    memory.close()
    memory.close()
    assert pycuda.trace == ["wait", "free_host", "free", "pop"] and not pycuda.memory


def test_each_thread_has_pycudas_context_for_as_long_as_its_engine(pycuda: FakePyCuda) -> None:
    """pycuda aborts the process when a thread ends with a context on its stack, and has none in threads that pushed none."""
    left: list[int] = []

    def engine() -> None:
        memory = cuda.open_memory()
        memory.free(memory.alloc(4))
        memory.close()
        left.append(len(pycuda.stack()))

    for thread in [threading.Thread(target=engine) for _ in range(2)]:
        thread.start()
        thread.join()
    with closing(cuda.open_memory()) as outer:
        engine()
        outer.alloc(4)
    assert left == [0, 0, 1] and pycuda.stack() == []


def test_errors_of_pycuda_are_ours_and_a_failed_start_is_undone(pycuda: FakePyCuda) -> None:
    memory = cuda.open_memory()
    pycuda.broken = "mem_alloc"
    with pytest.raises(CudaError, match="CUDA: mem_alloc failed"):
        memory.alloc(4)
    memory.close()
    for broken in ("init", "push", "stream"):
        pycuda.broken = broken
        with pytest.raises(RuntimeUnavailable, match=f"PyCuda: CUDA: {broken} failed"):
            cuda.open_memory()
        assert pycuda.stack() == []


# ---- the driver itself


class FakeDriver:
    """libcuda.so.1 by ctypes, with one device."""

    def __init__(self, init: int = 0, count: int = 1) -> None:
        self.init, self.count = init, count

    def cuInit(self, flags: int) -> int:
        return self.init

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.count
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        device._obj.value = ordinal
        return 0 if self.count else 101

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:
        name.value = b"Orin"
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        value._obj.value = {75: 8, 76: 7}[attribute]
        return 0


@pytest.mark.parametrize(
    ("driver", "words"),
    [(FakeDriver(100, 0), "cuInit returned 100"), (FakeDriver(0, 0), "sees no device"), (FakeDriver(), None)],
)
def test_the_drivers_answers_are_read(driver: FakeDriver, words: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: driver)
    problem = cuda.driver_problem()
    assert problem is None if words is None else words in (problem or "")


def test_the_device_has_a_name_to_tell_it_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: FakeDriver())
    assert cuda.device_name() == "Orin (sm_87)"
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: FakeDriver(count=0))
    with pytest.raises(RuntimeUnavailable, match="does not describe device 0"):
        cuda.device_name()
