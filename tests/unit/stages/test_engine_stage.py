"""Errors of the stage `engine` are found before any stage runs."""

from __future__ import annotations

from typing import Any

import pytest

from yolo_compress.errors import EnvironmentLacks, RecipeError
from yolo_compress.recipe.recipe import load
from yolo_compress.stages import engine


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


@pytest.mark.fault(62)
def test_a_runtime_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.BACKENDS["openvino"], "probe", staticmethod(lambda: "no openvino; pip install openvino"))
    nothing: Any = None
    engine.check(asked(), nothing)
    with pytest.raises(EnvironmentLacks, match=r"engine\.runtimes: no openvino; pip install openvino"):
        engine.check(asked(engine__runtimes="openvino"), nothing)
