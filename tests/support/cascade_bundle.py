"""A store with the exports of two tiny models, a policy folder of both, and a bundle with them. All made without a chain.

In every second image, which is dark, the small model is wrong and the router chooses the large one; see `shade_engines`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.support import report_case
from tests.support.shade_engines import LARGE_PX, SMALL_PX, shade_set, write_engine
from yolo_compress.bundle import cascade_files, golden
from yolo_compress.bundle.make import code
from yolo_compress.data.dataset import Dataset, load
from yolo_compress.evaluate.cascade.write import fill, policy_json, publish
from yolo_compress.evaluate.rows import ENGINES
from yolo_compress.runtime.backends.base import load_info
from yolo_compress.runtime.detect.cascade import FEATURES
from yolo_compress.runtime.measure.golden import FOLDER as GOLDEN
from yolo_compress.runtime.secure.signed_manifest import About, seal
from yolo_compress.store.fingerprint import fingerprint
from yolo_compress.store.manifest import Artifact
from yolo_compress.store.store import Store

GOLDEN_IMAGES = 4
KEPT = 0.5  # every second image is bright


@dataclass(frozen=True)
class Workstation:
    """What `add` and `find` of `bundle.cascade_files` read.

    Attributes:
        policy: Policy folder.
        export: Export of the recipe, whose compressed model is the large one.
        built: Engines of the recipe.
    """

    folder: Path
    store: Store
    data: Dataset
    policy: Path
    export: Artifact
    built: Artifact

    def given(self) -> cascade_files.Given:
        return cascade_files.given(self.policy)


def artefact(store: Store, stage: str, of: str, files: dict[str, Path]) -> Artifact:
    """Publish copies of files and folders as an artefact."""
    key = {"stage": stage, "version": 1, "of": of}
    partial = store.partial(stage, fingerprint(key))
    for name, source in files.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, partial / name)
    environment: Any = {}
    return store.publish(stage, fingerprint(key), key, {}, environment, 1.0)


def workstation(root: Path) -> Workstation:
    """Write data, engines, store and policy folder."""
    data = load(str(shade_set(root / "data", 2, 8)))
    small = write_engine(root / "small", SMALL_PX, blind=True)
    large = write_engine(root / "large", LARGE_PX, blind=False)
    store = Store(root / "weights")
    artefact(store, "export", "small", {"compressed/fp32.onnx": root / "small/net.onnx"})
    export = artefact(store, "export", "large", {"compressed/fp32.onnx": root / "large/net.onnx"})
    row = {
        "model": "compressed",
        "runtime": "onnxruntime",
        "precision": "fp32",
        "source": "compressed/fp32.onnx",
        "reason": None,
    }
    (root / ENGINES).write_text(json.dumps([{**row, "folder": "compressed/onnxruntime-fp32"}]))
    built = artefact(store, "engine", "large", {ENGINES: root / ENGINES, "compressed/onnxruntime-fp32": large})
    weights = np.zeros(len(FEATURES))
    weights[FEATURES.index("shown")] = -1.0  # the object of a bright image is shown, that of a dark one is not
    infos = load_info(small), load_info(large)
    fill(root / "filled", policy_json(*infos, weights, 0.0, -0.3), (small, infos[0]), (large, infos[1]))
    publish(root / "filled", root / "policy", document(data, [info.onnx_sha256 for info in infos]))
    return Workstation(root, store, data, root / "policy", export, built)


def document(data: Dataset, digests: list[str]) -> dict[str, Any]:
    """What `yolo-compress cascade` would have measured."""
    found = report_case.cascade(image_set=data.val_digest, names=list(data.names))
    for name, digest in zip(("small", "large"), digests, strict=True):
        found[name] = {**found[name], "onnx_sha256": digest}
    return {**found, "cascade": {**found["cascade"], "kept": KEPT}}


def make_cascade_bundle(made: Workstation, root: Path, seed: bytes | None = None) -> Path:
    """Make a sealed bundle of the large model, with the cascade."""
    root.mkdir()
    code(root)
    (root / "onnx").mkdir()
    shutil.copyfile(made.export.file("compressed/fp32.onnx"), root / "onnx/fp32.onnx")
    onnx = {"fp32": "onnx/fp32.onnx"}
    given = made.given()
    sources = cascade_files.find(given, made.store, made.export, made.data)
    about: About = {
        "name": "shade",
        "target": "plain",
        "names": list(made.data.names),
        "imgsz": [LARGE_PX, LARGE_PX],
        "onnx": onnx,
        "golden": golden.write(root / GOLDEN, made.data, made.export, made.built, GOLDEN_IMAGES),
        "cascade": cascade_files.add(root, given, sources, onnx, made.data, made.built, GOLDEN_IMAGES),
    }
    seal(root, about, 3, seed)
    return root
