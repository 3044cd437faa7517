"""Triton Inference Server: a model repository with the FP32 ONNX file for ONNX Runtime. On the robot, a TensorRT plan can replace it.

The files are NAME/config.pbtxt and NAME/VERSION/model.onnx, as in Triton's docs/user_guide/model_repository.md. For a fixed batch,
`max_batch_size` is 0 and `dims` is the whole shape (model_configuration.md).
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from yolo_compress.bundle.network_io import Network, Tensor, read, require
from yolo_compress.runtime.detect.post import EVERY_BOX
from yolo_compress.runtime.files import sha256_file
from yolo_compress.runtime.secure.signed_manifest import Versioned

REPOSITORY = "triton/model_repository"
CONFIG, LABELS, MODEL = "config.pbtxt", "labels.txt", "model.onnx"
BATCH = 8  # max_batch_size of a model with a dynamic batch
_TYPES = {"FLOAT": "TYPE_FP32", "FLOAT16": "TYPE_FP16"}
_CONFIG = """# Version {version}. Follows Triton's documents; never run on a Triton server.
# For TensorRT: copy the repository out of the bundle, replace model.onnx by engines/tensorrt-{precision}/engine.plan as
# {version}/model.plan, and set backend: "tensorrt". Input: RGB (grey for one channel) from 0 to 1, letterboxed. Output: centre x, y,
# width, height in px, scores; {nms}.
name: "{model}"
backend: "onnxruntime"
max_batch_size: {batch}
input [
  {{
    name: "{input.name}"
    data_type: {input_type}
    dims: [ {input_dims} ]
  }}
]
output [
  {{
    name: "{output.name}"
    data_type: {output_type}
    dims: [ {output_dims} ]
  }}
]
version_policy: {{ latest: {{ num_versions: 1 }} }}
"""


def model_name(about: Versioned) -> str:
    """Return the model's name for Triton. It is the recipe's name, but all characters except letters, digits and `-` become `_`."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", str(about["name"])) or "model"


def write(directory: Path, network: Network, about: Versioned, precision: str) -> list[str]:
    """Write Triton's model repository into the bundle, and return the written files."""
    name, version = model_name(about), str(about["version"])
    folder = directory / REPOSITORY / name
    (folder / version).mkdir(parents=True)
    shutil.copyfile(network.path, folder / version / MODEL)
    (folder / LABELS).write_text("".join(f"{label}\n" for label in about["names"]), encoding="utf-8")
    text = _CONFIG.format(
        version=version,
        precision=precision,
        model=name,
        batch=0 if network.batch > 0 else BATCH,
        input=network.input,
        output=network.output,
        input_type=_TYPES[network.input.kind],
        output_type=_TYPES[network.output.kind],
        input_dims=", ".join(_dims(network.input, network.batch)),
        nms="no NMS" if network.iou < EVERY_BOX else "NMS is not needed",
        output_dims=", ".join(_dims(network.output, network.batch)),
    )
    (folder / CONFIG).write_text(text, encoding="utf-8")
    return [f"{REPOSITORY}/{name}/{file}" for file in (CONFIG, LABELS, f"{version}/{MODEL}")]


def _dims(tensor: Tensor, batch: int) -> list[str]:
    return [str(side) for side in (tensor.shape if batch > 0 else tensor.shape[1:])]


def check(directory: Path, network: Network, about: Versioned) -> None:
    """Read the configuration back, and compare it with the ONNX file in the repository. Also compare this file with the model.

    Raises:
        RecipeError: A value differs.
    """
    folder = directory / REPOSITORY / model_name(about)
    path = folder / CONFIG
    said = parse_pbtxt(path.read_text(encoding="utf-8"))
    served = read(folder / str(about["version"]) / MODEL)
    require(path, (served.input, served.output), (network.input, network.output), MODEL)
    require(path, sha256_file(served.path), sha256_file(network.path), f"sha256 of {MODEL}")
    require(path, said["name"], [folder.name], "name")
    require(path, said["backend"], ["onnxruntime"], "backend")
    require(path, said["max_batch_size"], ["0" if served.batch > 0 else str(BATCH)], "max_batch_size")
    for key, tensor in (("input", served.input), ("output", served.output)):
        expected = {"name": [tensor.name], "data_type": [_TYPES[tensor.kind]], "dims": _dims(tensor, served.batch)}
        require(path, said[key], [expected], key)
    labels = (folder / LABELS).read_text(encoding="utf-8").splitlines()
    require(path, labels, list(about["names"]), LABELS)


def parse_pbtxt(text: str) -> dict[str, list[Any]]:
    """Parse the part of the protobuf text format that `_CONFIG` uses. The value of every field is a list. A message is a dict."""
    words = re.findall(r'"[^"\n]*"|[A-Za-z0-9_.-]+|[{}\[\],:]', re.sub(r"(?m)#.*$", "", text))

    def message(end: str | None) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        while words and words[0] != end:
            name = words.pop(0)
            if words[0] == ":":
                words.pop(0)
            found.setdefault(name, []).extend(value())
        if end is not None:
            words.pop(0)
        return found

    def value() -> list[Any]:
        word = words.pop(0)
        if word == "{":
            return [message("}")]
        if word != "[":
            return [word.strip('"')]
        many: list[Any] = []
        while words[0] != "]":
            if words[0] == ",":
                words.pop(0)
            else:
                many += value()
        words.pop(0)
        return many

    return message(None)
