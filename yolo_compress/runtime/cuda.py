"""Device memory and a stream, through whichever of cuda-python and pycuda imports; and a probe of the driver.

Never ran on a device. The probe uses ctypes and comes before everything else: without a driver `tensorrt.Runtime` returns
an object around a null pointer, whose first use ends the process.
"""

from __future__ import annotations

import ctypes
from typing import Any, Dict, Optional, Protocol

import numpy as np

from .errors import RuntimeUnavailable

DRIVER_LIBRARY = "libcuda.so.1"


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


class CudaMemory(Protocol):
    """Raw device pointers and one stream; copies are asynchronous on that stream."""

    @property
    def stream(self) -> int:
        """Handle of the stream."""

    def alloc(self, size: int) -> int: ...

    def to_device(self, pointer: int, host: np.ndarray) -> None: ...

    def to_host(self, host: np.ndarray, pointer: int) -> None: ...

    def synchronize(self) -> None: ...

    def close(self) -> None:
        """Free everything that was allocated here."""


class CudaPython:
    """cuda-python: `cuda.bindings` (12.9 and later), `cuda.cudart` before."""

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError:
            from cuda import cudart as runtime
        self._cuda: Any = runtime
        self._pointers: "list[int]" = []
        self._stream = self._ok(self._cuda.cudaStreamCreate())
        self.stream = int(self._stream)

    def _ok(self, result: Any) -> Any:
        """Value of a call that returned (code, value) or (code,)."""
        if int(result[0]) != 0:
            text = self._cuda.cudaGetErrorString(result[0])[1]
            raise RuntimeError(f"CUDA: {text.decode() if isinstance(text, bytes) else text}")
        return result[1] if len(result) > 1 else None

    def alloc(self, size: int) -> int:
        self._pointers.append(int(self._ok(self._cuda.cudaMalloc(size))))
        return self._pointers[-1]

    def to_device(self, pointer: int, host: np.ndarray) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._ok(self._cuda.cudaMemcpyAsync(pointer, host.ctypes.data, host.nbytes, kind, self._stream))

    def to_host(self, host: np.ndarray, pointer: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._ok(self._cuda.cudaMemcpyAsync(host.ctypes.data, pointer, host.nbytes, kind, self._stream))

    def synchronize(self) -> None:
        self._ok(self._cuda.cudaStreamSynchronize(self._stream))

    def close(self) -> None:
        while self._pointers:
            self._ok(self._cuda.cudaFree(self._pointers.pop()))
        if self._stream is not None:
            self._ok(self._cuda.cudaStreamDestroy(self._stream))
            self._stream = None


class PyCuda:
    """pycuda in the device's primary context (`autoprimaryctx`): `autoinit` would make a second one beside torch's."""

    def __init__(self) -> None:
        import pycuda.autoprimaryctx  # noqa: F401
        import pycuda.driver as driver

        self._cuda: Any = driver
        self._allocations: Dict[int, Any] = {}
        self._stream = driver.Stream()
        self.stream = int(self._stream.handle)

    def alloc(self, size: int) -> int:
        allocation = self._cuda.mem_alloc(size)
        self._allocations[int(allocation)] = allocation
        return int(allocation)

    def to_device(self, pointer: int, host: np.ndarray) -> None:
        self._cuda.memcpy_htod_async(pointer, host, self._stream)

    def to_host(self, host: np.ndarray, pointer: int) -> None:
        self._cuda.memcpy_dtoh_async(host, pointer, self._stream)

    def synchronize(self) -> None:
        self._stream.synchronize()

    def close(self) -> None:
        while self._allocations:
            self._allocations.popitem()[1].free()


def open_memory() -> CudaMemory:
    """The first of cuda-python and pycuda that imports and starts.

    Raises:
        RuntimeUnavailable: neither does.
    """
    reasons = []
    for kind in (CudaPython, PyCuda):
        try:
            return kind()
        except (ImportError, RuntimeError) as error:  # not installed, or of another CUDA release than the driver
            reasons.append(f"{kind.__name__}: {error}")
    raise RuntimeUnavailable(
        "no access to CUDA memory from Python (" + "; ".join(reasons) + ")",
        "pip install cuda-python of the CUDA release that is installed, or pycuda",
    )
