"""Import of TensorRT's bindings after a check of the driver, and names that the TensorRT files share."""

from __future__ import annotations

from typing import Any

from ...errors import RuntimeUnavailable
from . import cuda

RUNTIME = "tensorrt"
ENGINE_FILE = "engine.plan"
GPU = "gpu"  # key in the sidecar's `built_on` for the device that the plan was built on
BROKEN = "10.2.0"  # its Linux wheel looks for a Windows library (ultralytics PR 24367)
HINT = "pip install tensorrt on a machine with an NVIDIA GPU; on a Jetson: sudo apt install python3-libnvinfer"


def library() -> Any:
    """Import tensorrt after checking that the driver works.

    Raises:
        RuntimeUnavailable: the bindings, the driver or a device is missing, or the release is broken.
    """
    try:
        import tensorrt
    except (ImportError, OSError) as error:
        raise RuntimeUnavailable(f"tensorrt does not import ({error})", HINT) from error
    problem = cuda.driver_problem()
    if problem is not None:
        raise RuntimeUnavailable(problem, "install NVIDIA's driver, or give the container the GPU (--gpus all)")
    if tensorrt.__version__ == BROKEN:
        raise RuntimeUnavailable(
            f"TensorRT {BROKEN} cannot build: its Linux wheel looks for libnvinfer_builder_resource_win",
            "pip install 'tensorrt!=10.2.0'",
        )
    return tensorrt
