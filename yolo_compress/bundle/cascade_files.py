"""The cascade of a bundle: find the ONNX files of both its models, and write its folder with golden images."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from yolo_compress import progress
from yolo_compress.bundle.io_contract import check_signatures
from yolo_compress.data.dataset import Dataset
from yolo_compress.errors import CorruptArtifact, GateFailed, RecipeError
from yolo_compress.evaluate.cascade.schema import CascadeDocument, validated
from yolo_compress.evaluate.cascade.write import DOCUMENT
from yolo_compress.evaluate.golden_images import sample, write_found
from yolo_compress.evaluate.rows import engine_rows
from yolo_compress.evaluate.tolerance import IOU, LEAST_SCORE, Detections
from yolo_compress.files import strict_json
from yolo_compress.runtime.backends.base import POLICY, is_policy, load_info
from yolo_compress.runtime.backends.ort import OrtBackend
from yolo_compress.runtime.commands.bundled_cascade import FOLDER
from yolo_compress.runtime.detect.cascade import Part, Policy, engines, joined
from yolo_compress.runtime.detect.detector import Detector
from yolo_compress.runtime.detect.pre import read_image
from yolo_compress.runtime.engine import build_cascade, open_engine, takes
from yolo_compress.runtime.files import sha256_file
from yolo_compress.runtime.measure.golden import FOLDER as GOLDEN
from yolo_compress.runtime.measure.golden import EngineOf, detections
from yolo_compress.runtime.secure.signed_manifest import CascadeAbout, GoldenAbout
from yolo_compress.store.entries import entries
from yolo_compress.store.manifest import Artifact, read_artifact
from yolo_compress.store.store import Store

FP32 = "fp32.onnx"


@dataclass(frozen=True)
class Given:
    """A cascade that is to be bundled.

    Attributes:
        folder: Policy folder.
        document: What `yolo-compress cascade` measured.
        kept: Share of the validation images that only the small model sees.
    """

    folder: Path
    policy: Policy
    document: CascadeDocument
    kept: float

    @property
    def recommended(self) -> bool:
        """Whether `yolo-compress cascade` recommends it."""
        return self.document["verdict"]["status"] == "pass"


@dataclass(frozen=True)
class Source:
    """The ONNX file of a model of the cascade: its name in an artefact of `export`."""

    export: Artifact
    name: str

    @property
    def file(self) -> Path:
        """Path of the file."""
        return self.export.file(self.name)


def given(folder: Path) -> Given:
    """Read the policy folder of the command line.

    Raises:
        RecipeError: It is no policy folder.
        EngineError, CorruptArtifact: A file is damaged, or an engine is of another model.
    """
    if not is_policy(folder):
        raise RecipeError(f"cascade={folder}: no policy folder; give a folder that `yolo-compress cascade` wrote")
    policy, document = engines(folder)[0], _document(folder / DOCUMENT)
    own = document["cascade"]
    models = [document["small"]["onnx_sha256"], document["large"]["onnx_sha256"]]
    if own is None or [policy.small.onnx_sha256, policy.large.onnx_sha256] != models:
        raise CorruptArtifact(
            f"{folder / DOCUMENT}: not of the policy in this folder; run `yolo-compress cascade` again"
        )
    return Given(folder, policy, document, float(own["kept"]))


def _document(file: Path) -> CascadeDocument:
    hint = "; run `yolo-compress cascade` again"
    content = strict_json.load(file, CorruptArtifact, hint)
    try:
        return validated(content)
    except ValueError as error:
        raise CorruptArtifact(f"{file}: {error}{hint}") from error


def check_verdict(asked: Given, force: bool) -> None:
    """Check that `yolo-compress cascade` recommends the cascade. With `force`, only print that it does not.

    Raises:
        GateFailed: The cascade is not recommended, and `force` is not set.
    """
    line = asked.document["verdict"]["line"]
    if not asked.recommended and not force:
        raise GateFailed(
            f"cascade={asked.folder}: {line}; no bundle is made (force=true makes one that is marked as forced)"
        )
    if not asked.recommended:
        progress.notice(f"forced: {line}")


def find(asked: Given, store: Store, export: Artifact, dataset: Dataset) -> tuple[Source, Source]:
    """Find the ONNX files of both models in the store, by their SHA-256. One of them must be the recipe's compressed model.

    Args:
        export: Artefact of the recipe's `export`.
        dataset: Data set of the recipe.

    Raises:
        RecipeError: The classes or the validation images are not the recipe's, the recipe has neither model, or a file is not found.
        CorruptArtifact: A file was altered.
    """
    policy, what = asked.policy, f"cascade={asked.folder}"
    if list(policy.names) != list(dataset.names):
        raise RecipeError(f"{what}: its classes are {list(policy.names)}, the recipe's are {list(dataset.names)}")
    if asked.document["image_set"] != dataset.val_digest:
        raise RecipeError(
            f"{what}: measured over image set {asked.document['image_set'][:16]}, the recipe's is {dataset.val_digest[:16]}; run "
            "`yolo-compress cascade` with the recipe's data"
        )
    parts = (policy.small, policy.large)
    own = {entry["sha256"] for name, entry in export.manifest.files.items() if name.startswith("compressed/")}
    if not own & {part.onnx_sha256 for part in parts}:
        raise RecipeError(
            f"{what}: neither model is the compressed model of this recipe; give the recipe of one of them"
        )
    small, large = (
        _source(what, name, part, store, export) for name, part in zip(("small", "large"), parts, strict=True)
    )
    for other in {source.export.path: source.export for source in (small, large)}.values():
        if other.path != export.path:
            store.verify(other)
    return small, large


def _exports(store: Store, first: Artifact) -> Iterator[Artifact]:
    """Yield the artefacts of `export` in the store, `first` before the others."""
    yield first
    for entry in entries(store.folder):
        if entry.stage == "export" and not entry.state and entry.path != first.path:
            yield read_artifact(entry.path)


def _source(what: str, name: str, part: Part, store: Store, first: Artifact) -> Source:
    for export in _exports(store, first):
        for file, entry in export.manifest.files.items():
            if entry["sha256"] == part.onnx_sha256 and file.endswith(".onnx"):
                return Source(export, file)
    raise RecipeError(
        f"{what}: no export in weights/store has the ONNX file of {name} ({part.onnx_sha256[:16]}); run the recipe that made it "
        "again, or fit the cascade to engines of present recipes"
    )


def add(
    root: Path,
    asked: Given,
    sources: tuple[Source, Source],
    onnx: Mapping[str, str],
    dataset: Dataset,
    built: Artifact,
    count: int,
) -> CascadeAbout:
    """Write the folder `cascade/` of a bundle: the policy, the ONNX files that the bundle does not have yet, and golden images.

    Args:
        root: Folder of the bundle.
        sources: ONNX files of the small and the large model.
        onnx: ONNX files of the bundle: stem -> file below `root`.
        built: Artefact of the recipe's `engine`. Its runtimes make the expected detections.
        count: Number of golden images.

    Returns:
        The entry for the manifest.

    Raises:
        RecipeError: None of the runtimes takes both files.
        GateFailed: A model has another input or output than the bundle's.
        DataError: No image goes to one of the two models.
    """
    folder = root / FOLDER
    folder.mkdir()
    shutil.copyfile(asked.folder / POLICY, folder / POLICY)
    files, present = [], {sha256_file(root / file): file for file in onnx.values()}
    for name, part, source in zip(("small", "large"), (asked.policy.small, asked.policy.large), sources, strict=True):
        file = present.get(part.onnx_sha256)
        if file is None:
            (folder / name).mkdir()
            shutil.copyfile(source.file, folder / name / source.file.name)
            file = f"{FOLDER}/{name}/{source.file.name}"
            check_signatures([root / file], part.imgsz, len(dataset.names), dataset.channels)
        files.append(file)
    engines_built = [(row["runtime"], row["precision"]) for row in engine_rows(built) if not row["reason"]]
    return {
        "small": files[0],
        "large": files[1],
        "kept": asked.kept,
        "verdict": asked.document["verdict"]["status"],
        "golden": _golden(
            folder, asked.policy, [root / file for file in files], sources, dataset, engines_built, count
        ),
    }


def _golden(
    folder: Path,
    policy: Policy,
    files: Sequence[Path],
    sources: Sequence[Source],
    dataset: Dataset,
    built: Sequence[tuple[str, str]],
    count: int,
) -> GoldenAbout:
    """Build the cascade for each runtime that takes both files, and write golden images with its detections.

    Args:
        built: (runtime, precision) of the engines of this recipe. A runtime whose engine in a precision was left out gets no cascade.
    """
    runtimes = list(dict.fromkeys(runtime for runtime, _ in built))
    pairs = list(zip(files, (policy.small.precision, policy.large.precision), strict=True))
    fitting = [
        runtime
        for runtime in runtimes
        if all(takes(file.stem, runtime, precision) and (runtime, precision) in built for file, precision in pairs)
    ]
    if not fitting:
        raise RecipeError(
            f"the cascade is of {files[0].name} and {files[1].name}, and no runtime of engine.runtimes ({', '.join(runtimes)}) takes "
            "both; run `yolo-compress cascade` with two engines of one runtime, or add a runtime"
        )
    progress.say(f"bundle: computing the detections of the cascade in {max(count, 2)} golden images")
    found, about, margins = dict[str, Detections](), dict[str, EngineOf](), list[np.ndarray]()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        indices, images = list[int](), list[np.ndarray]()
        for runtime in fitting:
            (scratch / runtime).mkdir()
            build_cascade(folder / POLICY, files, runtime, scratch / runtime)
            engine = stack.enter_context(open_engine(scratch / runtime))
            detector = Detector(engine)
            if not images:
                indices, images = _images(detector, dataset, count)
            (_, small), (_, large) = engines(scratch / runtime)[1]
            key = f"{runtime}-{engine.precision}"
            found[key] = detections(engine, images, LEAST_SCORE, IOU)
            margins.append(np.array([detector.margin(image) for image in images]))
            about[key] = {
                "executed": engine.executed,
                "library": small.library,
                "onnx_sha256": joined(small, large).onnx_sha256,
            }
        agreed_I = np.abs(np.sign(margins).sum(axis=0)) == len(margins)
        margin_I = np.where(agreed_I, np.sign(margins[0]) * np.abs(margins).min(axis=0), 0.0)
        if engine.precision != "fp32":
            _add_fp32(sources, images, margin_I > 0, found, about, scratch)
    names = [dataset.val[index].name for index in indices]
    return write_found(folder / GOLDEN, names, images, found, about, max(count, 2), margin_I)


def _images(detector: Detector, dataset: Dataset, count: int) -> tuple[list[int], list[np.ndarray]]:
    """Return validation images that golden images are chosen from. More are tried until there are enough for each model."""
    indices, images = sample(dataset, count)
    handed = [detector.margin(image) > 0 for image in images]
    least = max((count + 1) // 2, 1)
    for index in sorted(set(range(len(dataset.val))) - set(indices)):
        lacking = [kind for kind in (False, True) if handed.count(kind) < least]
        if not lacking:
            break
        image_HW3 = read_image(dataset.val[index].image)
        kind = detector.margin(image_HW3) > 0
        if kind in lacking:
            indices, images, handed = [*indices, index], [*images, image_HW3], [*handed, kind]
    return indices, images


def _add_fp32(
    sources: Sequence[Source],
    images: Sequence[np.ndarray],
    handed_I: np.ndarray,
    found: dict[str, Detections],
    about: dict[str, EngineOf],
    scratch: Path,
) -> None:
    """Add the detections of both models in FP32, each in its images, if they were exported in FP32.

    The tolerance then covers the difference between them and the lower precision, as for a single model.
    """
    names = [str(PurePosixPath(source.name).with_name(FP32)) for source in sources]
    if any(name not in source.export.manifest.files for name, source in zip(names, sources, strict=True)):
        return
    rows, infos = [], []
    for number, (name, source) in enumerate(zip(names, sources, strict=True)):
        out = scratch / f"fp32-{number}"
        OrtBackend.build(source.export.file(name), out, "fp32")
        infos.append(load_info(out))
        with open_engine(out) as engine:
            rows.append(detections(engine, images, LEAST_SCORE, IOU))
    found["onnxruntime-fp32"] = [rows[int(handed)][index] for index, handed in enumerate(handed_I)]
    about["onnxruntime-fp32"] = {
        "executed": "fp32",
        "library": infos[0].library,
        "onnx_sha256": joined(*infos).onnx_sha256,
    }
