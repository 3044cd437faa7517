"""Open engines with the backend of their runtime."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Container, Dict, List, Optional, Sequence, Tuple, Union

from . import registry
from .backends.base import POLICY, EngineBackend, EngineInfo, is_policy, load_info
from .detect import cascade
from .errors import EngineError
from .files import sha256_file
from .measure.device import cpu_model


def open_engine(
    path: Union[str, Path], threads: Optional[int] = None, onnx_sha256: Optional[str] = None
) -> EngineBackend:
    """Open an engine directory with the runtime that its sidecar names, or both engines of a policy folder.

    Args:
        path: directory made by a backend's `build`, such as `weights/digits/engine/compressed/onnxruntime-int8`. Or the folder that
            `yolo-compress cascade` wrote.
        threads: threads of one inference on a CPU. None: one per usable processor. An engine on a GPU allows only None.
        onnx_sha256: SHA-256 of the ONNX file that the engine must be built from. None: any ONNX file. A policy folder allows only
            None.

    Returns:
        A backend to call (see `Backend`) or to pass to a `Detector`. Use the backend in a `with` block, since it may hold device
        memory. A cascade can only be passed to a `Detector`.

    Raises:
        EngineError: `load_info` rejects the files, which are checked before an engine library reads them. Or `threads` is not
            None and the engine runs on a GPU. Or its INT8 file was chosen on another processor.
        RuntimeUnavailable: the library or device is missing.
    """
    directory = Path(path)
    if onnx_sha256 is None and is_policy(directory):
        return _open_cascade(directory, threads)
    info = load_info(directory, onnx_sha256)
    if info.runtime not in BACKENDS:
        raise EngineError(f"{directory}: of runtime {info.runtime!r}, expected one of {', '.join(BACKENDS)}")
    if chosen_elsewhere(info):
        raise EngineError(
            f"{directory}: its INT8 file was chosen for {info.built_on.get('cpu')}, and may give wrong boxes on {cpu_model()}; "
            "build the engine again (on a robot: python3 build.py)"
        )
    row = registry.RUNTIMES[info.runtime]
    opened: EngineBackend
    if row.takes_threads:
        opened = BACKENDS[info.runtime](directory, threads=threads)
    elif threads is None:
        opened = BACKENDS[info.runtime](directory)
    else:
        raise EngineError(f"{directory}: threads={threads} has no effect on a {row.title} engine; leave it out")
    return opened


def chosen_elsewhere(info: EngineInfo) -> bool:
    """Return whether the file that an engine was built from was chosen among several, on another processor than this one."""
    return bool(info.tried) and info.built_on.get("cpu") != cpu_model()


def _open_cascade(directory: Path, threads: Optional[int]) -> cascade.CascadeEngine:
    """Open the engines of a policy folder."""
    policy, found = cascade.engines(directory)
    with ExitStack() as stack:
        small, large = (stack.enter_context(open_engine(one, threads, info.onnx_sha256)) for one, info in found)
        stack.pop_all()  # both are open now, and the caller closes them
    return cascade.CascadeEngine(small, large, policy)


def build_cascade(policy: Path, files: Sequence[Path], runtime: str, out: Path, **options: Any) -> None:
    """Build both engines of a cascade for a runtime. `out` becomes a policy folder.

    Args:
        policy: a `policy.json`, which is copied.
        files: ONNX file of the small and of the large model.
        out: an empty folder.
        options: options of the backend's `build`, for both engines.

    Raises:
        EngineError: a file is not the one that the policy was fitted to, or a library rejects it.
    """
    fitted = cascade.read_policy(policy.parent)
    for part, file in zip((fitted.small, fitted.large), files):
        digest = sha256_file(file)
        if digest != part.onnx_sha256:
            raise EngineError(
                f"{file}: ONNX {digest[:16]}, but the policy was fitted to {part.onnx_sha256[:16]}; run "
                "`yolo-compress cascade` for this file"
            )
        (out / part.folder).mkdir()
        BACKENDS[runtime].build(file, out / part.folder, part.precision, fitted.names, part.imgsz, **options)
    shutil.copyfile(str(policy), str(out / POLICY))


def names_of(path: Union[str, Path]) -> Tuple[str, ...]:
    """Check the files of an engine directory or a policy folder, and return the class names.

    Raises:
        EngineError: the files are damaged, see `open_engine`.
    """
    directory = Path(path)
    return cascade.engines(directory)[0].names if is_policy(directory) else load_info(directory).names


def on_gpu(path: Union[str, Path]) -> bool:
    """Return whether an engine, or one of the two engines of a policy folder, runs on a GPU.

    Raises:
        EngineError: the files are damaged, see `open_engine`.
    """
    directory = Path(path)
    infos = [info for _, info in cascade.engines(directory)[1]] if is_policy(directory) else [load_info(directory)]
    return any(registry.RUNTIMES[info.runtime].gpu for info in infos)


def onnx_forms(stems: Container[str], runtime: str, precision: str) -> List[str]:
    """Return the names of the ONNX files, without `.onnx`, from which an engine of this runtime and precision can be built.

    Some runtimes have their own INT8 file, such as `int8-openvino`. It is the first. The result depends on the installed version of
    the runtime.

    Args:
        stems: names of the available files, without `.onnx`.

    Returns:
        Some of `stems`. Empty: no file suits. More than one: `measure.int8_file` chooses the one that suits this processor.
    """
    own = next((stem for stem in (f"{precision}-{BACKENDS[runtime].form()}", precision) if stem in stems), None)
    also = registry.RUNTIMES[runtime].also if precision == "int8" else ()
    return [] if own is None else [own, *(stem for stem in also if stem in stems and stem != own)]


def takes(stem: str, runtime: str, precision: str) -> bool:
    """Return whether an ONNX file of `export` is the one for engines of this runtime and precision.

    For INT8 it has to be the runtime's own file. Other INT8 files may give wrong boxes, which is only found by `measure.int8_file`.

    Args:
        stem: name of the file, without `.onnx`.
    """
    row = registry.RUNTIMES[runtime]
    if precision == "int8" and stem not in {file.stem for file in row.int8} | {row.takes}:
        return False
    return bool(onnx_forms([stem], runtime, precision))


BACKENDS: Dict[str, Any] = {name: registry.backend(name) for name in registry.names()}
"""Runtime -> backend class. Each has `probe()` (None, or what to install), `form()` (name of the INT8 form that the installed
version takes) and `build(onnx, out, precision, **options)` (returns the files). Calling it with a directory opens the engine."""
