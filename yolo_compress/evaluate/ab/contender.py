"""One model of an A/B comparison. An engine, ONNX file or checkpoint is run now. A row of `bench` was measured earlier.

Each class has the attributes `label` (the text on the command line), `imgsz` (height and width in px; None: any) and `runs`
(whether inference is run). Its method `detections(data, imgsz, progress)` returns one N6 array for each image of `data.val`, and
the executed arithmetic as text. The method raises RecipeError if classes, size or images differ from the data set.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from yolo_compress.data.dataset import Dataset
from yolo_compress.errors import CorruptArtifact, DataError, NumericsError, RecipeError
from yolo_compress.evaluate.ab.latency_ratio import Rounds
from yolo_compress.evaluate.accuracy import accuracy
from yolo_compress.evaluate.coco import absolute_boxes
from yolo_compress.evaluate.rows import MeasuredBenchRow, bench_rows
from yolo_compress.evaluate.stored_detections import kept, row_name
from yolo_compress.lint.isolated import guard
from yolo_compress.runtime.backends.base import PRECISIONS, is_policy, load_info
from yolo_compress.runtime.backends.ort import OrtBackend
from yolo_compress.runtime.detect.cascade import read_policy
from yolo_compress.runtime.detect.detector import Detector
from yolo_compress.runtime.detect.pre import UnreadableImage, read_image
from yolo_compress.runtime.engine import open_engine
from yolo_compress.runtime.errors import NotFinite
from yolo_compress.runtime.measure.coco_map import mean_ap
from yolo_compress.runtime.measure.messages import Spec
from yolo_compress.store.manifest import MANIFEST, Artifact, payload, read_artifact, verify_payload

Progress = Callable[[int], Any]
Size = tuple[int, int]
_SAME_MAP = 1e-9  # stored detections are exact; only the order of sums differs


@dataclass
class Engine:
    """An engine directory, as one model of the comparison. For an .onnx file, `open_contender` builds the engine first."""

    label: str
    folder: Path
    imgsz: Size | None = None
    runs: bool = True

    def __post_init__(self) -> None:
        self.imgsz = load_info(self.folder).imgsz

    def detections(self, data: Dataset, imgsz: Size, progress: Progress) -> tuple[list[np.ndarray], str]:
        with open_engine(self.folder) as backend:
            found = accuracy(backend, data.val, data.names, imgsz, progress)
        return found["detections"], found["executed"]

    def spec(self, data: Dataset, imgsz: Size, scratch: Path) -> Spec:
        """Return the spec for `measure_in_turn`."""
        return {"engine": str(self.folder)}


@dataclass
class Cascade:
    """The policy folder of a cascade. Its two engines may have two sizes, so it is compared with a model of any size."""

    label: str
    folder: Path
    imgsz: Size | None = None
    runs: bool = True

    def __post_init__(self) -> None:
        self.largest = read_policy(self.folder).large.imgsz

    def detections(self, data: Dataset, imgsz: Size, progress: Progress) -> tuple[list[np.ndarray], str]:
        with open_engine(self.folder) as backend:
            if tuple(backend.names) != tuple(data.names):
                raise RecipeError(f"the cascade's classes are {list(backend.names)}, the data set's {list(data.names)}")
            detector, found = Detector(backend), []
            for sample in data.val:
                try:
                    found.append(detector(read_image(sample.image)))
                except (UnreadableImage, NotFinite) as error:
                    kind = DataError if isinstance(error, UnreadableImage) else NumericsError
                    raise kind(f"{sample.image}: {error}") from error
                progress(1)
            return found, backend.executed


@dataclass
class Checkpoint:
    """An Ultralytics checkpoint (.pt) that torch runs. BatchNorm is folded into the convolutions, as Ultralytics does."""

    label: str
    file: Path
    imgsz: Size | None = None
    runs: bool = True
    module: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        from yolo_compress.nets import detect
        from yolo_compress.train import checkpoint

        self.module = detect.fuse(checkpoint.load_model(self.file))

    def _names(self) -> list[str]:
        return [self.module.names[k] for k in range(len(self.module.names))]

    def detections(self, data: Dataset, imgsz: Size, progress: Progress) -> tuple[list[np.ndarray], str]:
        from yolo_compress.evaluate.torch_backend import TorchBackend

        with TorchBackend(self.module, self._names(), imgsz) as backend:
            found = accuracy(backend, data.val, data.names, imgsz, progress)
        return found["detections"], f"{found['executed']} (torch)"

    def spec(self, data: Dataset, imgsz: Size, scratch: Path) -> Spec:
        """Return the spec for `measure_in_turn`."""
        from yolo_compress.evaluate.torch_latency import spec

        return spec(self.module, self._names(), imgsz, scratch)


@dataclass
class Measured:
    """A row that the stage `bench` measured. The stored detections and latencies are used; no inference is run."""

    label: str
    bench: Artifact
    row: MeasuredBenchRow
    runs: bool = False

    @property
    def imgsz(self) -> Size:
        height, width = self.bench.manifest.key["data"]["imgsz"]
        return height, width

    def detections(self, data: Dataset, imgsz: Size, progress: Progress) -> tuple[list[np.ndarray], str]:
        if self.row["image_set"] != data.val_digest:
            raise RecipeError(
                f"{self.label}: measured over image set {self.row['image_set'][:16]} ({self.bench.metrics['images']} images), "
                f"{data.yaml.name} has {data.val_digest[:16]} ({len(data.val)} images); give the whole data set of that bench"
            )
        found = kept(self.bench.file(f"detections/{row_name(self.row)}.npy"), len(data.val))
        value = mean_ap([absolute_boxes(sample) for sample in data.val], found, data.names)["map50_95"]
        if abs(value - self.row["map50_95"]) > _SAME_MAP:
            raise CorruptArtifact(
                f"{self.label}: the stored detections give mAP50-95 {value:.6f}, but the row has {self.row['map50_95']:.6f}: an "
                "earlier version stored fewer detections; run `bench` again"
            )
        return found, self.row["executed"]

    def rounds(self) -> Rounds:
        """Return the stored latencies in ms, one list per round."""
        return json.loads(self.bench.file("latency.json").read_text())[row_name(self.row)]


Contender = Engine | Cascade | Checkpoint | Measured


def open_contender(text: str, scratch: Path) -> Contender:
    """Open the model that `text` names, and check the model's files against their recorded digests.

    Args:
        text: path of an engine folder, a policy folder, an .onnx file or a .pt file. Or BENCH:ROW for a row of a `bench` artefact.
        scratch: folder for temporary files. If `text` is an .onnx file, an engine for ONNX Runtime is built there.

    Raises:
        RecipeError: `text` is none of these, or names a row that does not exist.
        CorruptArtifact, EngineError: a file was altered.
    """
    path, colon, name = Path(text), *text.rpartition(":")[1:]
    if path.suffix == ".pt":
        return Checkpoint(text, path)
    if path.suffix == ".onnx" and path.is_file():
        guard(path)
        precision = path.stem.partition("-")[0]  # as `export` names its files: "int8-openvino"
        OrtBackend.build(path, scratch / "engine", precision if precision in PRECISIONS else "fp32")
        return Engine(text, scratch / "engine")
    if colon and not path.exists():
        return _measured(text, Path(text.rpartition(":")[0]), name)
    if (path / MANIFEST).is_file():
        return _measured(text, path, "")
    if path.is_dir():
        return Cascade(text, path) if is_policy(path) else Engine(text, path)
    raise RecipeError(f"{text}: no engine folder, .onnx, .pt or BENCH:ROW of that name")


def _measured(text: str, folder: Path, name: str) -> Measured:
    if not (folder / MANIFEST).is_file():
        raise RecipeError(
            f"{text}: {folder} is no bench artefact; give BENCH:ROW as in weights/digits/bench:original-torch-fp32"
        )
    bench = read_artifact(folder)
    if bench.stage != "bench":
        raise RecipeError(
            f"{text}: an artefact of {bench.stage}, not of bench; give an engine folder in it, an .onnx, a .pt, or BENCH:ROW"
        )
    verify_payload(bench, set(payload(folder)))
    rows = {row_name(row): row for row in bench_rows(bench)}
    if name not in rows:
        raise RecipeError(f"{text}: which row of the bench? {', '.join(f'{folder}:{row}' for row in rows)}")
    row = rows[name]
    if row["status"] != "ok":
        raise RecipeError(f"{text}: was not measured: {row['reason']}")
    return Measured(text, bench, row)


def one_size(both: Sequence[Contender], asked: Size | None) -> Size:
    """Return the input size (height, width) in px that both models take. A cascade takes any; for two cascades it is A's largest.

    Raises:
        RecipeError: the sizes differ, or no model has a fixed size and `asked` is None. Or `asked` has no effect.
    """
    cascades = [side for side in both if isinstance(side, Cascade)]
    if len(cascades) == len(both):
        if asked is not None:
            raise RecipeError(f"imgsz={asked[0]},{asked[1]}: has no effect on two cascades; leave it out")
        return cascades[0].largest
    sizes = {side.label: side.imgsz for side in both if side.imgsz is not None}
    if asked is not None:
        sizes["imgsz"] = asked
    if len(set(sizes.values())) > 1:
        described = ", ".join(f"{label} is {size[0]}x{size[1]} px" for label, size in sizes.items())
        raise RecipeError(f"A/B compares at one size (height x width): {described}")
    if not sizes:
        what = "a checkpoint takes" if cascades else "two checkpoints take"
        raise RecipeError(f"{what} any size: say which, as in imgsz=640")
    return next(iter(sizes.values()))
