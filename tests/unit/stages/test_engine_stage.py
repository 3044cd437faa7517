"""Errors of the stage `engine` are found before any stage runs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from yolo_compress.errors import EnvironmentLacks, RecipeError
from yolo_compress.recipe.recipe import load
from yolo_compress.runtime.errors import NotConverted
from yolo_compress.runtime.measure.int8_file import WrongBoxes
from yolo_compress.stages import Job, engine


def asked(**knobs: str) -> Any:
    return load("digits", [(knob.replace("__", "."), value) for knob, value in knobs.items()])


def test_eight_bits_where_they_saturate(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def saturates(runtime: str) -> bool:
        tried.append(runtime)
        return runtime == "openvino"

    monkeypatch.setattr(engine, "saturates", saturates)
    nothing: Any = None
    engine.check(asked(), nothing)
    assert not tried, "7 bits fit every processor"
    with pytest.raises(RecipeError, match=r"INT8 on openvino: 8-bit weights saturate.*set qat.weight_bits=7"):
        engine.check(asked(qat__weight_bits="8", engine__runtimes="onnxruntime,openvino"), nothing)
    engine.check(asked(qat__weight_bits="8", engine__runtimes="onnxruntime"), nothing)
    engine.check(asked(qat__weight_bits="8"), nothing)  # auto leaves that engine out, with the reason
    engine.check(asked(qat__weight_bits="8", engine__runtimes="openvino", export__precisions="fp32"), nothing)


def test_wrong_boxes_leave_one_engine_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After hours of training, auto goes on with the other engines. A runtime that the recipe names is an error."""

    def wrong(runtime: str, files: Any, out: Path, *check: Any, **options: Any) -> Path:
        out.mkdir(parents=True)
        (out / "left").touch()
        raise WrongBoxes("OpenVINO computes wrong boxes on this processor (int8.onnx: 9 boxes)")

    monkeypatch.setattr(engine, "build_suited", wrong)
    monkeypatch.setattr(engine, "int8_check", lambda *arguments: None)
    monkeypatch.setattr(engine, "read_image", lambda file: np.zeros((8, 8, 3), np.uint8))
    monkeypatch.setattr(
        engine, "first_wrong_layer", lambda *arguments: "the first wrong layer is /model.2/cv2/conv/Conv"
    )
    monkeypatch.setattr(engine, "_missing", lambda config, export: {"openvino": None})
    files = {f"compressed/{stem}.onnx": tmp_path / f"{stem}.onnx" for stem in ("fp32", "int8", "int8-openvino")}
    for file in files.values():
        file.touch()
    export = SimpleNamespace(manifest=SimpleNamespace(files=files), file=files.__getitem__)

    def run(**knobs: str) -> None:
        recipe = asked(export__precisions="int8", **knobs)
        data: Any = SimpleNamespace(val=[SimpleNamespace(image="0.png")])
        inputs: Any = {"export": export}
        engine.run(Job(recipe.engine, recipe, data, inputs, tmp_path / "out", tmp_path))

    monkeypatch.setattr(engine, "PRECISIONS", ("int8",))
    (tmp_path / "out").mkdir()
    run()
    (row,) = json.loads((tmp_path / "out" / "engines.json").read_text())
    assert row["reason"].startswith("OpenVINO computes wrong boxes") and "folder" not in row
    assert row["reason"].endswith("; in int8-openvino.onnx, the first wrong layer is /model.2/cv2/conv/Conv")
    assert not (tmp_path / "out" / "compressed" / "openvino-int8").exists()
    with pytest.raises(WrongBoxes, match="wrong boxes"):
        run(engine__runtimes="openvino")


def test_a_model_that_a_converter_cannot_write_leaves_one_engine_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> Path:
        raise NotConverted("fp32.onnx: /model.9/Tanh is a Tanh, which this package does not convert to LiteRT")

    monkeypatch.setattr(engine.BACKENDS["litert"], "build", staticmethod(refuse))
    monkeypatch.setattr(engine, "_missing", lambda config, export: {"litert": None})
    monkeypatch.setattr(engine, "PRECISIONS", ("fp32",))
    files = {"compressed/fp32.onnx": tmp_path / "fp32.onnx"}
    export: Any = SimpleNamespace(manifest=SimpleNamespace(files=files), file=files.__getitem__)
    data: Any = SimpleNamespace(val=[])

    def run(**knobs: str) -> None:
        recipe = asked(export__precisions="fp32", **knobs)
        engine.run(Job(recipe.engine, recipe, data, {"export": export}, tmp_path, tmp_path))

    run()
    (row,) = json.loads((tmp_path / "engines.json").read_text())
    assert row["reason"].startswith("fp32.onnx: /model.9/Tanh is a Tanh") and "folder" not in row
    with pytest.raises(NotConverted):
        run(engine__runtimes="litert")


def test_int8_images_are_built_for_the_int8_engine_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: dict[str, dict[str, Any]] = {}

    def build(onnx: Path, out: Path, precision: str, **options: Any) -> None:
        built[out.name] = options
        raise NotConverted("seen")

    for runtime in ("litert", "onnxruntime"):
        monkeypatch.setattr(engine.BACKENDS[runtime], "build", staticmethod(build))
    monkeypatch.setattr(engine, "_missing", lambda config, export: {"litert": None, "onnxruntime": None})
    files = {f"compressed/{stem}.onnx": tmp_path / f"{stem}.onnx" for stem in ("fp32", "int8-onnxruntime")}
    export: Any = SimpleNamespace(manifest=SimpleNamespace(files=files), file=files.__getitem__)
    recipe, data = asked(engine__int8_images="true"), SimpleNamespace(val=[])
    engine.run(Job(recipe.engine, recipe, data, {"export": export}, tmp_path, tmp_path))  # type: ignore[arg-type]
    assert built == {
        "litert-fp32": {"int8_images": False},
        "litert-int8": {"int8_images": True},
        "onnxruntime-fp32": {},
        "onnxruntime-int8": {},
    }


@pytest.mark.fault(62)
@pytest.mark.parametrize(
    ("runtime", "knob", "value"), [("openvino", "runtimes", "openvino"), ("litert", "int8_images", "true")]
)
def test_a_runtime_that_is_not_here(monkeypatch: pytest.MonkeyPatch, runtime: str, knob: str, value: str) -> None:
    monkeypatch.setattr(engine.BACKENDS[runtime], "probe", staticmethod(lambda: "not here; pip install it"))
    nothing: Any = None
    engine.check(asked(), nothing)
    with pytest.raises(EnvironmentLacks, match=rf"engine\.{knob}: not here; pip install it"):
        engine.check(asked(**{f"engine__{knob}": value}), nothing)
