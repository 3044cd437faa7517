"""CUDA through cuda-python or pycuda: device memory, page-locked host memory, a stream, CUDA graphs, and a probe of the driver.

This file never ran on a device. Calls are checked against the signatures of cuda-python 11.8, 12.6, 12.9 and 13.5 and of pycuda
2026.1 (test_cuda.py). The probe uses ctypes and runs first: without a driver, `tensorrt.Runtime` wraps a null pointer, and its
first use ends the process.
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
    """Return None if the CUDA driver works and finds a device, else the problem."""
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
    """Return the name and compute capability of device 0 ("Orin (sm_87)"). Call it only if `driver_problem` returns None.

    Raises:
        RuntimeUnavailable: the driver gives an error.
    """
    driver = ctypes.CDLL(DRIVER_LIBRARY)
    device, name = ctypes.c_int(0), ctypes.create_string_buffer(256)
    numbers = [ctypes.c_int(0) for _ in COMPUTE_CAPABILITY]
    codes = [driver.cuDeviceGet(ctypes.byref(device), 0), driver.cuDeviceGetName(name, len(name), device)]
    for number, attribute in zip(numbers, COMPUTE_CAPABILITY):
        codes.append(driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device))
    if any(codes):
        raise RuntimeUnavailable(f"CUDA driver does not describe device 0 (codes {codes})", "check nvidia-smi")
    return f"{name.value.decode(errors='replace')} (sm_{numbers[0].value}{numbers[1].value})"


class CudaMemory(Protocol):
    """Allocate and copy device memory, on one CUDA stream. Copies are asynchronous. Every call may raise CudaError."""

    @property
    def stream(self) -> int:
        """Handle of the stream."""

    def alloc(self, size: int) -> int: ...

    def free(self, pointer: int) -> None: ...

    def pinned(self, count: int) -> np.ndarray:
        """Allocate page-locked memory for `count` float32. The device copies such memory directly, without a buffer of the driver."""

    def unpin(self, host: np.ndarray) -> None:
        """Free an array that `pinned` returned. Do not use the array or its views afterwards."""

    def to_device(self, pointer: int, host: np.ndarray) -> None: ...

    def to_host(self, host: np.ndarray, pointer: int) -> None: ...

    def synchronize(self) -> None: ...

    def capture(self, work: Callable[[], None]) -> Any:
        """Capture the calls that `work` puts on the stream as a graph, without running them. Errors of `work` are raised."""

    def launch(self, graph: Any) -> None: ...

    def forget(self, graph: Any) -> None:
        """Destroy a graph. Do this before freeing the memory that it uses."""

    def close(self) -> None:
        """Wait for the stream, then destroy the graphs, the memory and the stream."""


class CudaPython:
    """`CudaMemory` by cuda-python: `cuda.bindings` (11.8.7, and 12.8 and later), `cuda.cudart` in older releases."""

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError:
            from cuda import cudart as runtime
        self._cuda: Any = runtime
        self._pointers: List[int] = []
        self._hosts: Dict[int, np.ndarray] = {}
        self._graphs: List[Any] = []
        # Non-blocking, because the default stream waits for blocking streams, and its use by other code would end a capture.
        self._stream = self._ok(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking))
        self.stream = int(self._stream)

    def _ok(self, result: Any) -> Any:
        """Return the value of a call that returned (code, value) or (code,). Raise CudaError if the code is not 0."""
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
            cuda.cudaGetLastError()  # clears the error of the invalidated capture
            raise
        ended = cuda.cudaStreamEndCapture(self._stream)
        if int(ended[0]) != 0:
            cuda.cudaGetLastError()
        graph = self._ok(ended)
        try:
            # `cudaGraphInstantiate` has other arguments in CUDA 11 than from 12 on; this function is the same since 11.4.
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
    """`CudaMemory` by pycuda, without graphs, since pycuda cannot capture a stream. Make all calls from one thread.

    The class uses the device's primary context, as TensorRT and torch do, and pushes and pops the context itself. `pycuda.autoinit`
    would create a second context. The thread that first imports `pycuda.autoinit` or `pycuda.autoprimaryctx` pushes the context.
    The process aborts when this thread ends.
    """

    def __init__(self) -> None:
        import pycuda.driver as driver

        self._cuda: Any = driver
        self._allocations: Dict[int, Any] = {}
        self._hosts: Dict[int, Tuple[np.ndarray, Any]] = {}
        self._context: Any = None
        with self._converted_errors():
            driver.init()
            context = driver.Device(0).retain_primary_context()
            context.push()
            self._context = context
        try:
            with self._converted_errors():
                self._stream: Any = driver.Stream()
        except CudaError:
            self._leave()
            raise
        self.stream = int(self._stream.handle)

    @contextmanager
    def _converted_errors(self) -> Iterator[None]:
        """Convert pycuda's errors to CudaError."""
        try:
            yield
        except self._cuda.Error as error:
            raise CudaError(f"CUDA: {error}") from error

    def _leave(self) -> None:
        """Pop the context from this thread's stack. When its last reference is deleted, the context is released."""
        context, self._context = self._context, None
        with self._converted_errors():
            context.pop()

    def alloc(self, size: int) -> int:
        with self._converted_errors():
            allocation = self._cuda.mem_alloc(size)
        self._allocations[int(allocation)] = allocation
        return int(allocation)

    def free(self, pointer: int) -> None:
        with self._converted_errors():
            self._allocations.pop(pointer).free()

    def pinned(self, count: int) -> np.ndarray:
        with self._converted_errors():
            host = self._cuda.pagelocked_empty((count,), np.float32)
        self._hosts[host.ctypes.data] = (host, host.base)  # its base is the allocation
        return host

    def unpin(self, host: np.ndarray) -> None:
        with self._converted_errors():
            self._hosts.pop(host.ctypes.data)[1].free()

    def to_device(self, pointer: int, host: np.ndarray) -> None:
        with self._converted_errors():
            self._cuda.memcpy_htod_async(pointer, host, self._stream)

    def to_host(self, host: np.ndarray, pointer: int) -> None:
        with self._converted_errors():
            self._cuda.memcpy_dtoh_async(host, pointer, self._stream)

    def synchronize(self) -> None:
        with self._converted_errors():
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
    """Return a `CudaMemory` that uses cuda-python, or pycuda if cuda-python does not work.

    Raises:
        RuntimeUnavailable: neither cuda-python nor pycuda works.
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
