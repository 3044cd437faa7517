"""Write a policy folder: `policy.json`, copies of both engines, and the cascade document."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import numpy as np

from yolo_compress.files.atomic import TEMPORARY, fsync_directory, fsync_file, replace, storage_errors
from yolo_compress.runtime.backends.base import POLICY, SIDECAR, EngineInfo
from yolo_compress.runtime.detect.cascade import FEATURES, SCHEMA

DOCUMENT = "cascade.json"  # in the policy folder: everything that was measured


class PartJson(TypedDict):
    """A model in `policy.json`; see `runtime.detect.cascade.Part`."""

    folder: str
    onnx_sha256: str
    precision: str
    imgsz: list[int]  # [height, width], px


class PolicyJson(TypedDict):
    """Content of `policy.json`; see `runtime.detect.cascade.Policy`."""

    schema: int
    small: PartJson
    large: PartJson
    names: list[str]
    features: list[str]
    weights: list[float]
    bias: float
    threshold: float


def policy_json(
    small: EngineInfo, large: EngineInfo, weights_F: np.ndarray, bias: float, threshold: float
) -> PolicyJson:
    """Return the content of `policy.json`, which `runtime.detect.cascade.read_policy` reads."""
    return {
        "schema": SCHEMA,
        "small": _part("small", small),
        "large": _part("large", large),
        "names": list(small.names),
        "features": list(FEATURES),
        "weights": [float(weight) for weight in weights_F],
        "bias": float(bias),
        "threshold": float(threshold),
    }


def _part(folder: str, info: EngineInfo) -> PartJson:
    return {
        "folder": folder,
        "onnx_sha256": info.onnx_sha256,
        "precision": info.precision,
        "imgsz": list(info.imgsz),
    }


def fill(folder: Path, policy: PolicyJson, small: tuple[Path, EngineInfo], large: tuple[Path, EngineInfo]) -> None:
    """Write `policy.json` and copies of both engines into a folder, which is made."""
    folder.mkdir(parents=True)
    for name, (source, info) in (("small", small), ("large", large)):
        (folder / name).mkdir()
        for file in [*info.files, SIDECAR]:
            shutil.copyfile(source / file, folder / name / file)
    (folder / POLICY).write_text(json.dumps(policy, indent=1) + "\n", encoding="utf-8")


def publish(filled: Path, out: Path, document: Mapping[str, object]) -> None:
    """Copy a filled folder to `out`, with the cascade document added. `out` appears in one step.

    Raises:
        StorageError: the folder cannot be written.
    """
    partial = out.parent / f"{TEMPORARY}{secrets.token_hex(4)}-{out.name[-40:]}"
    try:
        with storage_errors(out):
            shutil.copytree(filled, partial)
            (partial / DOCUMENT).write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
            for path in sorted(partial.rglob("*")):
                if path.is_dir():
                    fsync_directory(path)
                else:
                    fsync_file(path)
            replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
