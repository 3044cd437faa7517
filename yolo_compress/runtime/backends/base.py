"""The `Backend` protocol, which every engine implements, and the sidecar `engine.json`, which describes an engine.

An engine directory holds the engine files and the sidecar. The sidecar states the SHA-256 of the source ONNX file, the version of
the engine library, and the SHA-256 of each engine file. `load_info` checks the files before an engine library deserialises them.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Protocol, Sequence, Tuple, TypedDict, Union

import numpy as np

from .. import json_text
from ..errors import EngineError, LatencyError, RuntimeUnavailable
from ..files import FileEntry, sha256_file
from ..measure.device import cpu_model
from ..registry import PRECISIONS
from .onnx_metadata import names_and_imgsz, needs_nms

__all__ = [
    "PRECISIONS",
    "SIDECAR",
    "Backend",
    "EngineBackend",
    "EngineError",
    "EngineInfo",
    "LatencyError",
    "RuntimeUnavailable",
    "Tried",
]

SIDECAR = "engine.json"
POLICY = "policy.json"  # in the folder of a cascade, which has two engines; see detect/cascade.py
Options = Dict[str, Union[bool, int, float, str, None]]  # build options in the sidecar


class Tried(TypedDict):
    """What was found about one of several INT8 files that an engine could be built from. See `measure.int8_file`."""

    p50_ms: Optional[float]  # median latency of its engine; null: not timed, because it is wrong or the only right one
    wrong: Optional[str]  # why its boxes are wrong on this processor; null: they are right


class Backend(Protocol):
    """A loaded engine that runs inference. Use it in a `with` block, because some engines hold device memory."""

    @property
    def names(self) -> Tuple[str, ...]:
        """Class names in the order of their index."""

    @property
    def precision(self) -> str:
        """The requested precision: fp32, fp16 or int8. See `executed` for the precision that runs."""

    @property
    def imgsz(self) -> Tuple[int, int]:
        """Height and width of the input, px."""

    @property
    def channels(self) -> int:
        """Channels of the input: 3 (RGB) or 1 (grey)."""

    @property
    def batch(self) -> Optional[int]:
        """Number of images per call. None: the engine takes any number."""

    @property
    def needs_nms(self) -> bool:
        """Whether the boxes need NMS. If not, the model gives one box for each object, as YOLO26 does."""

    @property
    def executed(self) -> str:
        """Number types in which the runtime really computes, as text: "int8 (57 int8, 7 fp32; of 64 convolutions)"."""

    def __call__(self, images_BCHW: np.ndarray, copy: bool = True) -> np.ndarray:
        """Run one inference.

        Args:
            images_BCHW: (B, C, H, W) float32 array in 0..1, RGB (C = 3) or grey (C = 1).
            copy: If False, the output may be memory of the library. The next call then overwrites the output.

        Returns:
            (B, 4 + nc, A) float32 array: for each of A anchors, centre x, centre y, width, height in letterboxed px, then the scores
            of the nc classes.
        """

    def bind(self, images_BCHW: np.ndarray) -> Callable[[], Any]:
        """Return a function without arguments. It runs one inference on these images, and returns when the inference is done.

        Latency is measured by calling this function. On a GPU, the function does not copy between host and device memory.
        """

    def __enter__(self) -> "Backend": ...

    def __exit__(self, *exception: Any) -> None: ...


class EngineBackend(Backend, Protocol):
    """A backend of an engine library that can time the nodes of its graph."""

    def node_ms(self, runs: int) -> Dict[str, float]:
        """Return a dict from node name to time in ms: the minimum over `runs` profiled inferences.

        The engine library gives the names. The minimum is used because other processes can only make a node slower. They may
        interrupt nearly every run at the same node. The median time of such a node was 40 ms instead of 2 ms.
        """

    def __enter__(self) -> "EngineBackend": ...


@dataclass(frozen=True)
class EngineInfo:
    """Description of an engine, as stored in the sidecar `engine.json`.

    Attributes:
        imgsz: height and width of the input, px.
        names: class names in the order of their index.
        onnx_sha256: SHA-256 of the ONNX file that the engine was built from.
        library: version of the engine library.
        files: file name -> its size and SHA-256. Empty: a bare ONNX file.
        built_on: the machine that built the engine.
        options: build options.
        tried: ONNX file -> what was found about it here. Empty: there was only one file to build from.
        needs_nms: whether the boxes need NMS.
    """

    runtime: str
    precision: str
    imgsz: Tuple[int, int]
    names: Tuple[str, ...]
    onnx_sha256: str
    library: str
    files: Dict[str, FileEntry] = field(default_factory=dict)
    built_on: Dict[str, str] = field(default_factory=dict)
    options: Options = field(default_factory=dict)
    tried: Dict[str, Tried] = field(default_factory=dict)
    schema: int = 1
    needs_nms: bool = True


def describe_onnx(
    onnx: Path,
    runtime: str,
    precision: str,
    library: str,
    names: Optional[Sequence[str]] = None,
    imgsz: Optional[Tuple[int, int]] = None,
    options: Optional[Options] = None,
) -> EngineInfo:
    """Return the `EngineInfo` of an ONNX file, to build an engine from the file or to open it directly.

    If `names` or `imgsz` is None, the value is read from the metadata of the ONNX file.

    Raises:
        EngineError: the file does not exist, the precision is unknown, or the metadata lacks `names` or `imgsz`.
    """
    if precision not in PRECISIONS:
        raise EngineError(f"precision {precision!r}, expected one of {', '.join(PRECISIONS)}")
    if not onnx.is_file():
        raise EngineError(f"{onnx}: no such ONNX file; run export first")
    if names is None or imgsz is None:
        found_names, found_imgsz = names_and_imgsz(onnx)
        names, imgsz = names or found_names, imgsz or found_imgsz
    return EngineInfo(
        runtime,
        precision,
        (int(imgsz[0]), int(imgsz[1])),
        tuple(names),
        sha256_file(onnx),
        library,
        built_on={"cpu": cpu_model(), "machine": platform.machine(), "system": platform.system()},
        options=dict(options or {}),
        needs_nms=needs_nms(onnx),
    )


def save_info(info: EngineInfo, directory: Path, files: Sequence[str]) -> EngineInfo:
    """Hash the engine files and write the sidecar `engine.json`. Return `info` with the hashes in its attribute `files`."""
    hashed: Dict[str, FileEntry] = {
        name: {"sha256": sha256_file(directory / name), "size": (directory / name).stat().st_size}
        for name in sorted(files)
    }
    document = dict(asdict(info), files=hashed)
    if info.needs_nms:
        document.pop("needs_nms")  # as in sidecars of earlier versions
    partial = directory / (SIDECAR + ".partial")
    partial.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial, directory / SIDECAR)
    return _from_json(document)


def _from_json(document: Any) -> EngineInfo:
    height, width = document["imgsz"]
    return EngineInfo(**dict(document, imgsz=(int(height), int(width)), names=tuple(document["names"])))


def is_policy(directory: Path) -> bool:
    """Return whether a folder is the policy folder of a cascade, not the folder of one engine."""
    return (directory / POLICY).is_file()


def load_info(directory: Path, onnx_sha256: Optional[str] = None) -> EngineInfo:
    """Read and return the sidecar `engine.json`. Check that every engine file has the size and SHA-256 that the sidecar states.

    Args:
        directory: directory of the engine.
        onnx_sha256: SHA-256 of the ONNX file that the engine must be built from. None: any ONNX file.

    Raises:
        EngineError: the sidecar is missing or damaged, a file is missing, altered or truncated, or the engine was built from
            another ONNX file.
    """
    sidecar = directory / SIDECAR
    if is_policy(directory):
        raise EngineError(f"{directory}: a cascade of two engines, one engine expected; give one of its engine folders")
    info = _read_sidecar(sidecar)
    if onnx_sha256 is not None and onnx_sha256 != info.onnx_sha256:
        raise EngineError(
            f"{directory}: built from ONNX {info.onnx_sha256[:16]}, expected {onnx_sha256[:16]}; build the engine again"
        )
    for name, entry in info.files.items():
        path = directory / name
        if Path(name).name != name or name == "..":
            raise EngineError(f"{sidecar}: file name {name!r} leaves the directory; refused")
        if not path.is_file():
            raise EngineError(f"{path}: missing; build the engine again")
        if path.stat().st_size != entry["size"]:
            raise EngineError(
                f"{path}: {path.stat().st_size} bytes, expected {entry['size']} (truncated?); build the engine again"
            )
        if sha256_file(path) != entry["sha256"]:
            raise EngineError(f"{path}: sha256 is not the one in {SIDECAR} (altered); not loaded, build it again")
    return info


def _read_sidecar(sidecar: Path) -> EngineInfo:
    """Read the sidecar `engine.json` and check its format. The engine files are not checked."""
    try:
        info = _from_json(json_text.read(sidecar))
        formed = all(isinstance(entry["sha256"], str) and entry["size"] >= 0 for entry in info.files.values())
    except OSError as error:
        raise EngineError(f"{sidecar}: {error.strerror}; not an engine directory, build it again") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(f"{sidecar}: damaged ({error}); build the engine again") from error
    formed = formed and isinstance(info.needs_nms, bool)
    if info.schema != 1 or not info.files or not formed or info.precision not in PRECISIONS:
        raise EngineError(
            f"{sidecar}: schema {info.schema}, precision {info.precision!r}, {len(info.files)} files; schema 1, one of "
            f"{', '.join(PRECISIONS)} and some files expected; build the engine again"
        )
    return info


def resolve(
    path: Path, runtime: str, precision: Optional[str], library: str, engine_files: Sequence[str] = ()
) -> EngineInfo:
    """Check and return the `EngineInfo` of an engine directory, or of an ONNX file that is opened directly.

    Args:
        path: engine directory or ONNX file.
        precision: for a directory, the required precision (None: any). For an ONNX file, the precision of the file (None: fp32).
        library: version of the engine library.
        engine_files: files that the runtime will open. The sidecar must list each of them.

    Raises:
        EngineError: `load_info` rejects the directory, or the engine is for another runtime or precision.
    """
    if not path.is_dir():
        return describe_onnx(path, runtime, precision or "fp32", library)
    info = load_info(path)
    if info.runtime != runtime:
        raise EngineError(f"{path}: holds an engine of {info.runtime}, not of {runtime}")
    unlisted = [name for name in engine_files if name not in info.files]
    if unlisted:
        raise EngineError(f"{path / SIDECAR}: has no entry for {', '.join(unlisted)}; build the engine again")
    if precision is not None and precision != info.precision:
        raise EngineError(
            f"{path}: holds {info.precision}, expected {precision}; an engine is not converted on loading"
        )
    return info


def check_output(info: EngineInfo, shape: Sequence[Any], where: Path) -> None:
    """Raise EngineError if the output shape is not [B, 4 + number of classes, A]."""
    if len(shape) != 3 or (isinstance(shape[1], int) and shape[1] >= 0 and shape[1] != 4 + len(info.names)):
        raise EngineError(
            f"{where}: output {list(shape)}, expected [batch, {4 + len(info.names)}, anchors] for "
            f"{len(info.names)} classes; build it from the export of the same model (without NMS in the graph)"
        )


def check_channels(channels: Any, where: Path) -> int:
    """Return the number of input channels. Raise EngineError unless it is 3 (RGB) or 1 (grey)."""
    if channels not in (1, 3):
        raise EngineError(f"{where}: takes images of {channels} channels, expected 3 (RGB) or 1 (grey); export again")
    return int(channels)


def check_input(images_BCHW: np.ndarray, backend: Backend) -> np.ndarray:
    """Return the images as a contiguous array.

    Raises:
        ValueError: the engine does not accept the type or shape of the images.
    """
    batch = backend.batch
    wanted = ("any" if batch is None else batch, backend.channels, *backend.imgsz)
    shape = images_BCHW.shape
    if images_BCHW.dtype != np.float32 or shape[1:] != wanted[1:] or (batch is not None and shape[0] != batch):
        raise ValueError(f"images are {images_BCHW.dtype} {list(shape)}, expected float32 {list(wanted)}")
    return np.ascontiguousarray(images_BCHW)


def census_words(precision: str, counts: Dict[str, int]) -> str:
    """Return the text of `Backend.executed`. `counts` is the number of convolutions by type: {"fp32": 7, "int8": 57}."""
    total = sum(counts.values())
    if not total:
        return f"{precision} asked; no convolution could be read from the library's report"
    ranked = sorted(counts, key=lambda kind: (-counts[kind], kind))
    if len(ranked) == 1 and ranked[0] == precision:
        return precision
    parts = ", ".join(f"{counts[kind]} {kind}" for kind in ranked)
    if len(ranked) == 1:
        return f"{ranked[0]} (all {total} convolutions; {precision} asked)"
    return f"{ranked[0]} ({parts}; of {total} convolutions)"


def problem(use: Callable[[], object]) -> Optional[str]:
    """Call `use`, a first use of an engine library. Return what is missing and what to install. None: nothing is missing."""
    try:
        use()
    except RuntimeUnavailable as error:
        return str(error)
    return None
