"""An INT8 engine is built from the file that is right and fastest on this processor. The processor is simulated."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.quant_net import NAMES, SIZE, images, net
from yolo_compress.evaluate.exported_files import literal
from yolo_compress.evaluate.int8_check import int8_check
from yolo_compress.export.float_onnx import export_onnx
from yolo_compress.export.qdq import insert_qdq
from yolo_compress.quant.calibrate import ptq
from yolo_compress.quant.ranges import fold
from yolo_compress.runtime import engine
from yolo_compress.runtime.backends.base import Backend, EngineInfo, load_info
from yolo_compress.runtime.engine import open_engine
from yolo_compress.runtime.errors import EngineError
from yolo_compress.runtime.files import sha256_file
from yolo_compress.runtime.measure import int8_file
from yolo_compress.runtime.measure.int8_file import build_suited, choice

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The float file, OpenVINO's INT8 file and TensorRT's."""
    folder, model = tmp_path_factory.mktemp("int8"), net()
    export_onnx(model, folder / "fp32.onnx", SIZE, names=NAMES)
    state = fold(ptq(model, lambda: [images(4)], "max"), model)
    insert_qdq(folder / "fp32.onnx", folder / "int8-openvino.onnx", state, "openvino")
    insert_qdq(folder / "fp32.onnx", folder / "int8.onnx", state, "tensorrt10")
    return folder / "fp32.onnx", folder / "int8-openvino.onnx", folder / "int8.onnx"


def timed(monkeypatch: pytest.MonkeyPatch, ms: dict[str, float]) -> list[str]:
    """Replace the timing by fixed latencies. Return the list of the files that are timed."""
    seen: list[str] = []

    def in_turn(specs: Sequence[Any], rounds: int, calls: int) -> list[dict[str, Any]]:
        seen.extend(spec["label"] for spec in specs)
        return [{"rounds_ms": [[ms[spec["label"]]] * calls] * rounds} for spec in specs]

    monkeypatch.setattr(int8_file, "measure_in_turn", in_turn)
    return seen


def wrong_on(files: Sequence[Path]) -> Callable[[Backend, EngineInfo], str | None]:
    """A processor on which the engines of these files give wrong boxes."""
    broken = {sha256_file(file) for file in files}
    return lambda backend, info: "9 boxes without a partner" if info.onnx_sha256 in broken else None


@pytest.mark.parametrize(
    ("own_ms", "other_ms", "expected"),
    [(5.0, 4.0, "int8.onnx"), (5.0, 4.9, "int8-openvino.onnx"), (5.0, 6.0, "int8-openvino.onnx")],
)
def test_the_fastest_right_file_and_the_own_one_if_all_are_as_fast(
    files: tuple[Path, Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own_ms: float,
    other_ms: float,
    expected: str,
) -> None:
    _, own, other = files
    seen = timed(monkeypatch, {own.name: own_ms, other.name: other_ms})
    chosen = build_suited("openvino", [own, other], tmp_path / "engine", wrong_on([]))
    assert chosen.name == expected and seen == [own.name, other.name]
    info = load_info(tmp_path / "engine", sha256_file(chosen))
    assert info.tried == {
        own.name: {"p50_ms": own_ms, "wrong": None},
        other.name: {"p50_ms": other_ms, "wrong": None},
    }
    assert choice(own.name, info.tried) == f"{own.name} ({own_ms:g} ms); {other.name} takes {other_ms:g} ms"
    assert sorted(entry.name for entry in (tmp_path / "engine").iterdir()) == [
        "engine.bin",
        "engine.json",
        "engine.xml",
    ]
    with open_engine(tmp_path / "engine") as opened:
        assert opened(images(1).numpy()).shape == (1, 4 + len(NAMES), 84)


def test_a_file_with_wrong_boxes_is_never_chosen(
    files: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, own, other = files
    seen = timed(monkeypatch, {own.name: 5.0, other.name: 1.0})
    assert build_suited("openvino", [own, other], tmp_path / "a", wrong_on([other])) == own and not seen
    assert load_info(tmp_path / "a").tried[other.name] == {"p50_ms": None, "wrong": "9 boxes without a partner"}
    assert "int8.onnx gives wrong boxes on this processor (9 boxes" in choice(own.name, load_info(tmp_path / "a").tried)
    assert build_suited("openvino", [own, other], tmp_path / "b", wrong_on([own])) == other and not seen
    with pytest.raises(
        EngineError, match=r"wrong boxes on this processor \(int8-openvino.onnx: 9 boxes.*; int8.onnx: 9"
    ):
        build_suited("openvino", [own, other], tmp_path / "c", wrong_on([own, other]))
    assert not (tmp_path / "c" / "engine.json").exists()


def test_an_engine_chosen_on_another_processor_is_refused(
    files: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, own, other = files
    timed(monkeypatch, {own.name: 5.0, other.name: 5.0})
    build_suited("openvino", [own, other], tmp_path / "engine", wrong_on([]))
    monkeypatch.setattr(engine, "cpu_model", lambda: "Another 3000")
    with pytest.raises(
        EngineError, match="was chosen for .*, and may give wrong boxes on Another 3000; build the engine again"
    ):
        open_engine(tmp_path / "engine")
    sidecar = json.loads((tmp_path / "engine" / "engine.json").read_text())
    (tmp_path / "engine" / "engine.json").write_text(json.dumps({**sidecar, "tried": {}}))
    open_engine(tmp_path / "engine").__exit__(None, None, None)  # built from the only file: right on every processor


class Altered:
    """An engine whose scores are moved, as saturated sums move them."""

    def __init__(self, opened: Any, by: float) -> None:
        self._opened, self._by = opened, by

    def __getattr__(self, name: str) -> Any:
        return getattr(self._opened, name)

    def __call__(self, batch: np.ndarray, copy: bool = True) -> np.ndarray:
        output = np.array(self._opened(batch))
        output[:, 4:] = np.clip(output[:, 4:] - self._by, 0, 1)
        return output


def test_an_engine_has_to_compute_what_its_file_says(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    floating, own, _ = files
    pictures = [(image.numpy().transpose(1, 2, 0) * 255).astype(np.uint8) for image in images(4, seed=3)]
    check = int8_check([own], floating, pictures)
    engine.BACKENDS["openvino"].build(own, tmp_path / "engine", "int8")
    info = load_info(tmp_path / "engine")
    exact = literal(own)

    class Exact(Altered):
        def __call__(self, batch: np.ndarray, copy: bool = True) -> np.ndarray:
            return exact(batch)

    with open_engine(tmp_path / "engine") as opened:
        assert check(Exact(opened, 0.0), info) is None  # type: ignore[arg-type]
        found = check(Altered(opened, 0.5), info)  # type: ignore[arg-type]
    assert found is not None and "10 % of scores off by 0.5" in found
