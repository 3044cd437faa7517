"""TensorRT's logger. Also creates its Runtime and Builder, whose errors are only in the log. This file never ran on a device."""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any, List

from ...errors import RuntimeUnavailable, printable

DRIVER_HINT = "update NVIDIA's driver, or install the TensorRT and cuda-python of the CUDA release that it supports"


@lru_cache(maxsize=None)
def logger(trt: Any) -> Any:
    """Return the logger of this process, which writes to stderr and collects errors. TensorRT complains about a second logger.

    `take()` returns and clears the collected errors. `words()` also clears them, and returns the last error as the end of a
    message.
    """

    class Log(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self, base: Any) -> None:
            base.__init__(self)  # TensorRT's binding refuses super()
            self.errors: List[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.Logger.INTERNAL_ERROR, trt.Logger.ERROR):
                self.errors.append(str(message))
            elif severity != trt.Logger.WARNING:
                return
            print(printable(f"[TensorRT] {message}"), file=sys.stderr, flush=True)

        def take(self) -> List[str]:
            errors, self.errors = self.errors, []
            return errors

        def words(self) -> str:
            errors = self.take()
            return f": {errors[-1]}" if errors else ""

    return Log(trt.ILogger)


def runtime(trt: Any) -> Any:
    """Create a tensorrt.Runtime.

    If the driver is too old, the Runtime wraps a null pointer, and its first use ends the process. Only the log shows this.

    Raises:
        RuntimeUnavailable: TensorRT logged an error.
    """
    log = logger(trt)
    log.take()
    made = trt.Runtime(log)
    errors = log.take()
    if errors:
        raise RuntimeUnavailable(f"TensorRT {trt.__version__} does not start ({errors[0]})", DRIVER_HINT)
    return made


def builder(trt: Any) -> Any:
    """Create a tensorrt.Builder.

    Raises:
        RuntimeUnavailable: TensorRT cannot create a Builder, for example because the driver is too old.
    """
    log = logger(trt)
    log.take()
    try:
        return trt.Builder(log)
    except TypeError as error:  # "factory function returned nullptr"
        reason = log.words() or f": {error}"
        raise RuntimeUnavailable(f"TensorRT {trt.__version__} does not start{reason}", DRIVER_HINT) from error
