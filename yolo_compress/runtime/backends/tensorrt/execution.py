"""One execution context of a TensorRT engine, run directly or as a CUDA graph. This file never ran on a device.

A graph depends on the state of the context that it was captured from: shapes, addresses and activations. So each `Execution` has
its own context and buffers, and a new shape discards the graph (NVIDIA's Best Practices, "CUDA Graphs"). The first run of a shape
is direct, because TensorRT then does work that cannot be captured (NVIDIA/TensorRT #2603). The second run is captured. Every
later run is one launch of the graph.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any, NamedTuple, Optional, Tuple

import numpy as np

from ...errors import CudaError, EngineError, printable
from .cuda import CudaMemory


class Tensors(NamedTuple):
    """Names of the input and the output of an engine."""

    input: str
    output: str


class HostAndDevice:
    """A tensor with page-locked host memory and device memory. The memory only grows, so a smaller batch uses the same addresses.

    Args:
        memory: allocator of the host memory and the device memory.
        host: If False, only device memory is allocated.
    """

    def __init__(self, memory: CudaMemory, host: bool = True) -> None:
        self._memory, self._wanted = memory, host
        self._count, self._held = 0, np.empty(0, np.float32)
        self.pointer = 0
        self.host = self._held

    def fit(self, shape: Tuple[int, ...]) -> None:
        """Allocate memory for float32 of this shape. No inference may be running on the old memory, and no graph may use it."""
        count = math.prod(shape)
        if count > self._count:
            self.close()
            self.pointer = self._memory.alloc(4 * count)
            if self._wanted:
                self._held = self._memory.pinned(count)
            self._count = count
        if self._wanted:
            self.host = self._held[:count].reshape(shape)

    def close(self) -> None:
        """Free host and device memory."""
        if self._count:
            self._count, pointer = 0, self.pointer
            held, self._held, self.host = self._held, np.empty(0, np.float32), np.empty(0, np.float32)
            self._memory.free(pointer)
            if self._wanted:
                self._memory.unpin(held)


class Execution:
    """An execution context with its buffers. A call runs one inference on the content of `source`, and waits for the result.

    Args:
        engine: tensorrt.ICudaEngine.
        memory: allocator of the buffers. Inferences run on its stream.
        tensors: names of the input and the output, both float32.
        where: file of the engine, for messages.
        refused: reason not to use a CUDA graph. None: use a graph.
        transfers: whether a run includes the copies from and to the host.

    Attributes:
        source, result: the input and the output.
        refused: reason why inferences do not run as a CUDA graph. None: from the second run of a shape on, they run as one.
    """

    def __init__(
        self,
        engine: Any,
        memory: CudaMemory,
        tensors: Tensors,
        where: Path,
        refused: Optional[str] = None,
        transfers: bool = True,
    ) -> None:
        self.refused = refused
        self._memory, self._tensors, self._where, self._transfers = memory, tensors, where, transfers
        self.context: Any = engine.create_execution_context()
        if self.context is None:
            raise EngineError(f"{where}: no execution context (device memory full?); TensorRT's log (stderr) says why")
        self.source, self.result = HostAndDevice(memory, transfers), HostAndDevice(memory, transfers)
        self._shape: Optional[Tuple[int, ...]] = None
        self._plain_runs = 0  # with this shape
        self._graph: Any = None

    def fit(self, shape: Tuple[int, ...]) -> None:
        """Prepare for inputs of this shape. The addresses stay the same until the shape changes.

        Raises:
            EngineError: TensorRT rejects the shape.
            CudaError: there is not enough memory.
        """
        if shape == self._shape:
            return
        self._shape, self._plain_runs = None, 0
        self._forget()
        if not self.context.set_input_shape(self._tensors.input, shape):
            raise EngineError(
                f"{self._where}: built for other batches than {shape[0]} (or, before TensorRT 8.6, one of a dynamic batch is "
                "already in use here); build it with a max_batch that includes it"
            )
        gives = tuple(self.context.get_tensor_shape(self._tensors.output))
        for tensor, side, sized in (
            (self._tensors.input, self.source, shape),
            (self._tensors.output, self.result, gives),
        ):
            side.fit(sized)
            if not self.context.set_tensor_address(tensor, side.pointer):
                raise EngineError(f"{self._where}: TensorRT does not take an address for {tensor}")
        self._shape = shape

    def __call__(self) -> None:
        if self._graph is None and self._plain_runs and self.refused is None:
            self._capture()
        if self._graph is not None:
            self._memory.launch(self._graph)
        else:
            self._enqueue()
            self._plain_runs += 1
        self._memory.synchronize()

    def _enqueue(self) -> None:
        if self._transfers:
            self._memory.to_device(self.source.pointer, self.source.host)
        if not self.context.execute_async_v3(self._memory.stream):
            raise EngineError(f"{self._where}: TensorRT could not enqueue an inference; its log (stderr) says why")
        if self._transfers:
            self._memory.to_host(self.result.host, self.result.pointer)

    def _capture(self) -> None:
        """Capture `_enqueue` as a graph. If that fails, print the reason, set `refused`, and continue without a graph."""
        try:
            self._graph = self._memory.capture(self._enqueue)
        except (CudaError, EngineError) as error:
            self.refused = str(error)
            print(printable(f"{self._where}: runs without a CUDA graph: {error}"), file=sys.stderr, flush=True)

    def _forget(self) -> None:
        graph, self._graph = self._graph, None
        if graph is not None:
            self._memory.forget(graph)

    def close(self) -> None:
        """Destroy the graph, then the context and the buffers, which the graph uses."""
        self._forget()
        self.context = self._shape = None
        self.source.close()
        self.result.close()
