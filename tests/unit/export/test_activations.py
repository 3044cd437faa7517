"""Activations that the files of a runtime cannot hold are refused before anything trains."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from yolo_compress.errors import RecipeError
from yolo_compress.export.activations import check_converted, check_int8
from yolo_compress.recipe.recipe import load
from yolo_compress.runtime.registry import RUNTIMES
from yolo_compress.stages import _load_or_train, engine, export


def model_of(*acts: nn.Module) -> nn.Module:
    model = nn.Sequential(*(nn.Module() for _ in acts))
    for module, act in zip(model, acts, strict=True):
        module.act = act
    return model


@pytest.mark.parametrize("act", [nn.Softmax(1), nn.Threshold(0.1, 0.0)])
def test_an_activation_without_int8_support(act: nn.Module) -> None:
    with pytest.raises(
        RecipeError, match=f"activation {type(act).__name__}: (INT8 files do|ONNX opset 17 does) not support it"
    ):
        check_int8(model_of(nn.SiLU(), act), 17)


@pytest.mark.parametrize(
    ("act", "kind"), [(nn.ReLU6(), "Clip"), (nn.Hardswish(), "HardSwish"), (nn.Mish(), "Softplus")]
)
def test_an_activation_that_a_converter_does_not_write(act: nn.Module, kind: str) -> None:
    for runtime, row in RUNTIMES.items():
        if runtime in ("litert", "coreml"):
            words = f"activation {type(act).__name__}: is a {kind}, which this package does not convert to {row.title}; leave it"
            with pytest.raises(RecipeError, match=words):
                check_converted(model_of(nn.SiLU(), act), 17, runtime, "leave it out")
        else:  # they read ONNX, or pnnx decides
            check_converted(model_of(act), 17, runtime, "leave it out")


def test_activations_that_every_converter_writes() -> None:
    for runtime in RUNTIMES:
        model = model_of(nn.SiLU(), nn.ReLU(), nn.LeakyReLU(0.1), nn.Sigmoid(), nn.Identity())
        check_converted(model, 17, runtime, "leave it out")


def test_stages_refuse_them_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_load_or_train, "start", lambda *arguments: model_of(nn.ReLU6()))
    monkeypatch.setattr(engine, "_missing", lambda config, export: {})
    monkeypatch.setattr("yolo_compress.stages._coreml.require", lambda: None)
    data: Any = SimpleNamespace()
    engine.check(load("digits", []), data)  # auto leaves the engine out
    engine.check(load("digits", [("engine.runtimes", "onnxruntime,ncnn")]), data)
    with pytest.raises(RecipeError, match="is a Clip, .* LiteRT; leave litert out of engine.runtimes"):
        engine.check(load("digits", [("engine.runtimes", "onnxruntime,litert")]), data)
    floats = ("export.precisions", "fp32,fp16")
    export.check(load("digits", [floats]), data)
    with pytest.raises(RecipeError, match="is a Clip, .* CoreML; set export.coreml=false"):
        export.check(load("digits", [floats, ("export.coreml", "true")]), data)
