"""The processor that a study times its engines on. Latencies of two processors cannot be compared."""

from __future__ import annotations

import socket

from yolo_compress.errors import EnvironmentLacks, RecipeError
from yolo_compress.runtime.backends.tensorrt import cuda
from yolo_compress.runtime.engine import BACKENDS
from yolo_compress.runtime.errors import RuntimeUnavailable
from yolo_compress.runtime.measure.device import cpu_model
from yolo_compress.runtime.registry import RUNTIMES
from yolo_compress.search.study import Study


def processor(runtime: str) -> str:
    """Return the name of the processor, or of the GPU, that engines of a runtime run on here.

    Raises:
        RuntimeUnavailable: The engines run on a GPU, and there is none, or its driver gives an error.
    """
    if not RUNTIMES[runtime].gpu:
        return cpu_model()
    if problem := cuda.driver_problem():
        raise RuntimeUnavailable(f"{runtime} needs a GPU: {problem}", "check nvidia-smi")
    return cuda.device_name()


def check_runtime(runtime: str) -> None:
    """Check that a runtime works on this machine.

    Raises:
        EnvironmentLacks: It does not. The message names the machine.
    """
    if problem := BACKENDS[runtime].probe():
        raise EnvironmentLacks(f"{socket.gethostname()}: {problem}")


def check_machine(study: Study) -> None:
    """Check that the runtime works here, and that this machine has the processor that the study's baseline was timed on.

    Raises:
        RecipeError: It has another one.
        EnvironmentLacks: As for `check_runtime`.
        RuntimeUnavailable: As for `processor`.
    """
    check_runtime(study.goal.runtime)
    there = study.processor
    if there is not None and there != (here := processor(study.goal.runtime)):
        raise RecipeError(
            f"study {study.name} measures latencies on {there}, this machine has {here}: start workers on machines with the same "
            "processor and GPU, or search with search.cost=size"
        )
