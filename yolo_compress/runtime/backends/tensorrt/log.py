"""TensorRT's log, and the two starts that only the log explains. Never ran on a device."""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any, List

from ...errors import RuntimeUnavailable, printable

DRIVER_HINT = "update NVIDIA's driver, or install the TensorRT and cuda-python of the CUDA release that it supports"


@lru_cache(maxsize=None)
def logger(trt: Any) -> Any:
    """The process's one logger (TensorRT complains of a second): to stderr, as its own; and errors are kept for ours.

    It has `take()`, the errors since the last time, and `words()`, those for the end of a message.
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
            taken, self.errors = self.errors, []
            return taken

        def words(self) -> str:
            taken = self.take()
            return f": {taken[-1]}" if taken else ""

    return Log(trt.ILogger)


def runtime(trt: Any) -> Any:
    """tensorrt.Runtime. With a driver that is too old it wraps a null pointer, and all that tells is the log.

    Raises:
        RuntimeUnavailable: it is one; a use of it would end the process.
    """
    log = logger(trt)
    log.take()
    made = trt.Runtime(log)
    errors = log.take()
    if errors:
        raise RuntimeUnavailable(f"TensorRT {trt.__version__} does not start ({errors[0]})", DRIVER_HINT)
    return made


def builder(trt: Any) -> Any:
    """tensorrt.Builder.

    Raises:
        RuntimeUnavailable: there is none, as with a driver that is too old.
    """
    log = logger(trt)
    log.take()
    try:
        return trt.Builder(log)
    except TypeError as error:  # "factory function returned nullptr"
        said = log.words() or f": {error}"
        raise RuntimeUnavailable(f"TensorRT {trt.__version__} does not start{said}", DRIVER_HINT) from error
