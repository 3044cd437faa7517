"""Device memory, page-locked host memory, a stream and its CUDA graphs, through cuda-python or pycuda; and a probe of the driver.

Never ran on a device; calls are checked against the signatures of cuda-python 11.8, 12.6, 12.9 and 13.5 and of pycuda 2026.1
(test_cuda.py). The probe uses ctypes and comes before everything else: without a driver `tensorrt.Runtime` returns an object
around a null pointer, whose first use ends the process.
"""

from __future__ import annotations

import ctypes
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Optional, Protocol, Tuple

import numpy as np

from ...errors import CudaError, RuntimeUnavailable

DRIVER_LIBRARY = "libcuda.so.1"
COMPUTE_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h


def driver_problem() -> Optional[str]:
    """None if the CUDA driver is there and sees a device, else what is wrong."""
    try:
        driver = ctypes.CDLL(DRIVER_LIBRARY)
    except OSError as error:
        return f"no CUDA driver ({error})"
    code = driver.cuInit(0)
    if code:
        return f"CUDA driver does not start (cuInit returned {code})"
    count = ctypes.c_int(0)
    code = driver.cuDeviceGetCount(ctypes.byref(count))
    if code or count.value < 1:
        return f"CUDA driver sees no device (cuDeviceGetCount returned {code}, {count.value} devices)"
    return None


def device_name() -> str:
    """Name and compute capability of device 0 ("Orin (sm_87)"), after `driver_problem` was None.

    Raises:
        RuntimeUnavailable: the driver does not say.
    """
    driver = ctypes.CDLL(DRIVER_LIBRARY)
    device, name = ctypes.c_int(0), ctypes.create_string_buffer(256)
    numbers = [ctypes.c_int(0) for _ in COMPUTE_CAPABILITY]
    codes = [driver.cuDeviceGet(ctypes.byref(device), 0), driver.cuDeviceGetName(name, len(name), device)]
    for number, attribute in zip(numbers, COMPUTE_CAPABILITY):
        codes.append(driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device))
    if any(codes):
        raise RuntimeUnavailable(f"CUDA driver does not describe device 0 (codes {codes})", "look at nvidia-smi")
    return f"{name.value.decode(errors='replace')} (sm_{numbers[0].value}{numbers[1].value})"


class CudaMemory(Protocol):
    """Raw device pointers and one stream; copies are asynchronous on that stream. Every call may raise CudaError."""

    @property
    def stream(self) -> int:
        """Handle of the stream."""

    def alloc(self, size: int) -> int: ...

    def free(self, pointer: int) -> None: ...

    def pinned(self, count: int) -> np.ndarray:
        """`count` float32 of page-locked memory, which the device copies from and to without the driver's detour."""

    def unpin(self, host: np.ndarray) -> None:
        """Free what `pinned` returned; the array and its views must not be touched again."""

    def to_device(self, pointer: int, host: np.ndarray) -> None: ...

    def to_host(self, host: np.ndarray, pointer: int) -> None: ...

    def synchronize(self) -> None: ...

    def capture(self, work: Callable[[], None]) -> Any:
        """A graph of what `work` puts on the stream, which it does not run. CudaError, or what `work` raises: no graph."""

    def launch(self, graph: Any) -> None: ...

    def forget(self, graph: Any) -> None:
        """Destroy a graph, before the memory that it uses is freed."""

    def close(self) -> None:
        """Wait for the stream; then destroy graphs, memory and stream, in this order."""


class CudaPython:
    """cuda-python: `cuda.bindings` (11.8.7, and 12.8 and later), `cuda.cudart` before."""

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError:
            from cuda import cudart as runtime
        self._cuda: Any = runtime
        self._pointers: List[int] = []
        self._hosts: Dict[int, np.ndarray] = {}
        self._graphs: List[Any] = []
        # Non-blocking: work of others on the default stream, which waits for blocking streams, would end a capture.
        self._stream = self._ok(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking))
        self.stream = int(self._stream)

    def _ok(self, result: Any) -> Any:
        """Value of a call that returned (code, value) or (code,)."""
        if int(result[0]) != 0:
            text = self._cuda.cudaGetErrorString(result[0])[1]
            raise CudaError(f"CUDA: {text.decode() if isinstance(text, bytes) else text} (code {int(result[0])})")
        return result[1] if len(result) > 1 else None

    def alloc(self, size: int) -> int:
        self._pointers.append(int(self._ok(self._cuda.cudaMalloc(size))))
        return self._pointers[-1]

    def free(self, pointer: int) -> None:
        self._pointers.remove(pointer)
        self._ok(self._cuda.cudaFree(pointer))

    def pinned(self, count: int) -> np.ndarray:
        pointer = int(self._ok(self._cuda.cudaHostAlloc(4 * count, self._cuda.cudaHostAllocDefault)))
        self._hosts[pointer] = np.ctypeslib.as_array((ctypes.c_float * count).from_address(pointer))
        return self._hosts[pointer]

    def unpin(self, host: np.ndarray) -> None:
        del self._hosts[host.ctypes.data]
        self._ok(self._cuda.cudaFreeHost(host.ctypes.data))

    def to_device(self, pointer: int, host: np.ndarray) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._ok(self._cuda.cudaMemcpyAsync(pointer, host.ctypes.data, host.nbytes, kind, self._stream))

    def to_host(self, host: np.ndarray, pointer: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._ok(self._cuda.cudaMemcpyAsync(host.ctypes.data, pointer, host.nbytes, kind, self._stream))

    def synchronize(self) -> None:
        self._ok(self._cuda.cudaStreamSynchronize(self._stream))

    def capture(self, work: Callable[[], None]) -> Any:
        cuda = self._cuda
        mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal  # other threads may allocate meanwhile
        self._ok(cuda.cudaStreamBeginCapture(self._stream, mode))
        try:
            work()
        except BaseException:
            ended = cuda.cudaStreamEndCapture(self._stream)  # else the stream stays in capture
            if int(ended[0]) == 0:
                cuda.cudaGraphDestroy(ended[1])
            cuda.cudaGetLastError()  # an invalidated capture is kept as the last error
            raise
        ended = cuda.cudaStreamEndCapture(self._stream)
        if int(ended[0]) != 0:
            cuda.cudaGetLastError()
        graph = self._ok(ended)
        try:
            # `cudaGraphInstantiate` takes (graph, log, size) in CUDA 11 and (graph, flags) from 12; this one is the same since 11.4.
            executable = self._ok(cuda.cudaGraphInstantiateWithFlags(graph, 0))
        finally:
            cuda.cudaGraphDestroy(graph)  # the executable is a copy
        self._graphs.append(executable)
        return executable

    def launch(self, graph: Any) -> None:
        self._ok(self._cuda.cudaGraphLaunch(graph, self._stream))

    def forget(self, graph: Any) -> None:
        self._graphs = [held for held in self._graphs if held is not graph]
        self._ok(self._cuda.cudaGraphExecDestroy(graph))

    def close(self) -> None:
        if self._stream is None:
            return
        self.synchronize()
        while self._graphs:
            self.forget(self._graphs[-1])
        while self._hosts:
            self.unpin(self._hosts[next(iter(self._hosts))])
        while self._pointers:
            self.free(self._pointers[-1])
        stream, self._stream = self._stream, None
        self._ok(self._cuda.cudaStreamDestroy(stream))


class PyCuda:
    """pycuda in the device's primary context, which TensorRT and torch use too; without graphs, for it captures no streams.

    The context is pushed and popped here: `pycuda.autoinit` would make a second one beside torch's, and both it and
    `autoprimaryctx` push theirs in the thread that imports them first, whose end aborts the process. All calls belong to one thread.
    """

    def __init__(self) -> None:
        import pycuda.driver as driver

        self._cuda: Any = driver
        self._allocations: Dict[int, Any] = {}
        self._hosts: Dict[int, Tuple[np.ndarray, Any]] = {}
        self._context: Any = None
        with self._said():
            driver.init()
            context = driver.Device(0).retain_primary_context()
            context.push()
            self._context = context
        try:
            with self._said():
                self._stream: Any = driver.Stream()
        except CudaError:
            self._leave()
            raise
        self.stream = int(self._stream.handle)

    @contextmanager
    def _said(self) -> Iterator[None]:
        """pycuda's errors, which have a base of their own, as ours."""
        try:
            yield
        except self._cuda.Error as error:
            raise CudaError(f"CUDA: {error}") from error

    def _leave(self) -> None:
        """Take the context off this thread's stack; the last reference gives it back."""
        context, self._context = self._context, None
        with self._said():
            context.pop()

    def alloc(self, size: int) -> int:
        with self._said():
            allocation = self._cuda.mem_alloc(size)
        self._allocations[int(allocation)] = allocation
        return int(allocation)

    def free(self, pointer: int) -> None:
        with self._said():
            self._allocations.pop(pointer).free()

    def pinned(self, count: int) -> np.ndarray:
        with self._said():
            host = self._cuda.pagelocked_empty((count,), np.float32)
        self._hosts[host.ctypes.data] = (host, host.base)  # its base is the allocation
        return host

    def unpin(self, host: np.ndarray) -> None:
        with self._said():
            self._hosts.pop(host.ctypes.data)[1].free()

    def to_device(self, pointer: int, host: np.ndarray) -> None:
        with self._said():
            self._cuda.memcpy_htod_async(pointer, host, self._stream)

    def to_host(self, host: np.ndarray, pointer: int) -> None:
        with self._said():
            self._cuda.memcpy_dtoh_async(host, pointer, self._stream)

    def synchronize(self) -> None:
        with self._said():
            self._stream.synchronize()

    def capture(self, work: Callable[[], None]) -> Any:
        raise CudaError("pycuda cannot capture a stream; cuda-python can")

    def launch(self, graph: Any) -> None:
        raise AssertionError("there are no graphs of pycuda")

    forget = launch

    def close(self) -> None:
        if self._context is None:
            return
        self.synchronize()
        while self._hosts:
            self.unpin(next(iter(self._hosts.values()))[0])
        while self._allocations:
            self.free(next(iter(self._allocations)))
        self._stream = None  # destroyed with its last reference, while the context is current
        self._leave()


def open_memory() -> CudaMemory:
    """The first of cuda-python and pycuda that imports and starts.

    Raises:
        RuntimeUnavailable: neither does.
    """
    reasons = []
    for kind in (CudaPython, PyCuda):
        try:
            return kind()
        except (
            ImportError,
            RuntimeError,
            CudaError,
        ) as error:  # not installed, or of another CUDA release than the driver
            reasons.append(f"{kind.__name__}: {error}")
    raise RuntimeUnavailable(
        "no access to CUDA memory from Python (" + "; ".join(reasons) + ")",
        "pip install cuda-python of the CUDA release that is installed, or pycuda",
    )
