"""Build and open engines by the name of their runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Container, Dict, Optional, Union

from . import registry
from .backends.base import EngineBackend, load_info
from .errors import EngineError


def open_engine(
    path: Union[str, Path], threads: Optional[int] = None, onnx_sha256: Optional[str] = None
) -> EngineBackend:
    """Open an engine directory with the runtime that its sidecar names.

    Args:
        path: directory made by a backend's `build`, such as `weights/digits/engine/compressed/onnxruntime-int8`.
        threads: of one inference on a CPU; None = every usable processor. An error where the engine is on a GPU.
        onnx_sha256: if given, the ONNX that the engine has to come from.

    Returns:
        A backend to call (see `Backend`) or to give to a `Detector`. A context manager: it holds memory of the device.

    Raises:
        EngineError: see `load_info`; nothing is deserialised then. Or `threads` for an engine on a GPU.
        RuntimeUnavailable: the library or device is missing.
    """
    directory = Path(path)
    info = load_info(directory, onnx_sha256)
    if info.runtime not in BACKENDS:
        raise EngineError(f"{directory}: of runtime {info.runtime!r}, one of {', '.join(BACKENDS)} expected")
    row = registry.RUNTIMES[info.runtime]
    opened: EngineBackend
    if not row.gpu:
        opened = BACKENDS[info.runtime](directory, threads=threads)
    elif threads is None:
        opened = BACKENDS[info.runtime](directory)
    else:
        raise EngineError(f"{directory}: threads={threads} means nothing to a {row.title} engine; leave it out")
    return opened


def onnx_form(stems: Container[str], runtime: str, precision: str) -> Optional[str]:
    """The export that suits the runtime as it is installed here: its own form (`int8-openvino`) where there is one.

    Args:
        stems: file names without `.onnx`.
    """
    own = BACKENDS[runtime].form()
    return next((stem for stem in (f"{precision}-{own}", precision) if stem in stems), None)


BACKENDS: Dict[str, Any] = {name: registry.backend(name) for name in registry.names()}
"""Each has `probe()` -> None or the install hint, `form()` -> name of the INT8 form that it takes as it is installed here,
`build(onnx, out, precision, **options) -> files`, and opens a directory."""
