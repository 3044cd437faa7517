"""CoreML on a Mac, with a stand-in for CoreML: a program is run in torch, as `tests.support.ml_program` does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from tests.support import ml_program
from tests.support.quant_net import NAMES, SIZE, images, net, run_onnx
from yolo_compress.export.coreml import write_package
from yolo_compress.export.float_onnx import export_onnx
from yolo_compress.export.fp16 import to_fp16
from yolo_compress.export.qdq import insert_qdq
from yolo_compress.quant.calibrate import ptq
from yolo_compress.quant.ranges import fold
from yolo_compress.runtime.backends.base import EngineInfo
from yolo_compress.runtime.backends.coreml import MODEL_FILE, CoreMLBackend
from yolo_compress.runtime.backends.coreml_convert import library
from yolo_compress.runtime.commands import coreml as command
from yolo_compress.runtime.detect.detector import Detector
from yolo_compress.runtime.engine import open_engine
from yolo_compress.runtime.errors import EngineError
from yolo_compress.runtime.files import sha256_file
from yolo_compress.runtime.measure import golden

pytest.importorskip("coremltools")
pytestmark = pytest.mark.filterwarnings("ignore")  # of coremltools, about the versions of torch and scikit-learn


class StandIn:
    """`coremltools.models.MLModel` of a Mac."""

    def __init__(self, package: str) -> None:
        self.spec, self.program = ml_program.load(Path(package))

    def get_spec(self) -> Any:
        return self.spec

    def predict(self, values: dict[str, Any]) -> dict[str, np.ndarray]:
        if not self.spec.HasField("pipeline"):
            return {"output0": ml_program.run(self.program, torch.from_numpy(values["images"]))[0]}
        pixels = np.asarray(values["images"], np.float32).reshape(*SIZE, 3).transpose(2, 0, 1)[None].copy()
        scores, boxes = (torch.from_numpy(one) for one in ml_program.run(self.program, torch.from_numpy(pixels)))
        best, label = scores.max(1)
        corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)
        kept = torchvision.ops.batched_nms(corners, best, label, values["iouThreshold"])
        kept = kept[best[kept] > values["confidenceThreshold"]]
        return {"confidence": scores[kept].double().numpy(), "coordinates": boxes[kept].double().numpy()}


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> None:
    model = library().models.MLModel

    def opened(package: str, **options: Any) -> Any:
        return (
            StandIn(package) if set(options) == {"compute_units"} else model(package, **options)
        )  # the conversion's own

    monkeypatch.setattr(library().models, "MLModel", opened)
    monkeypatch.setattr(sys, "platform", "darwin")


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("coreml") / "fp32.onnx"
    export_onnx(net(), file, SIZE, names=NAMES)
    return file


def test_an_engine_gives_what_its_onnx_file_gives(mac: None, onnx_file: Path, tmp_path: Path) -> None:
    CoreMLBackend.build(onnx_file, tmp_path / "engine", "fp32")
    batch = images(1, seed=4)
    with open_engine(tmp_path / "engine") as engine:
        got = engine(batch.numpy())
        assert engine.executed == "fp32, as stored" and engine.batch == 1
    assert np.abs(got - run_onnx(onnx_file, batch)).max() < 0.05
    with pytest.raises(EngineError, match="threads=2 has no effect on a CoreML engine"):
        open_engine(tmp_path / "engine", threads=2)
    with (tmp_path / "engine" / MODEL_FILE).open("r+b") as file:
        file.write(b"x")
    with pytest.raises(EngineError, match="sha256 is not the one in engine.json"):
        open_engine(tmp_path / "engine")


def test_another_system_is_told_what_it_can_do(tmp_path: Path) -> None:
    assert (
        CoreMLBackend.probe()
        == "CoreML runs on macOS alone; on another system, export.coreml=true writes .mlpackage files"
    )


@pytest.fixture
def folder(onnx_file: Path, tmp_path: Path) -> Path:
    """What `export.coreml=true` writes, without the code: two packages, and golden images of what the ONNX file detects."""
    from yolo_compress.evaluate.exported_files import Simulated
    from yolo_compress.evaluate.golden_images import write_found

    root = tmp_path / "coreml"
    root.mkdir()
    write_package(onnx_file, root / "fp32.mlpackage", "fp32")
    write_package(onnx_file, root / "fp32-nms.mlpackage", "fp32", nms=True)
    pictures = [(one.permute(1, 2, 0).numpy() * 255).astype(np.uint8) for one in images(2, seed=6)]
    with Simulated(onnx_file, "fp32", "fp32.onnx") as engine:
        found = golden.detections(engine, pictures, 0.001, 0.7)
    about: Any = {"executed": "", "library": "none", "onnx_sha256": ""}
    write_found(root / "golden", ["a", "b"], pictures, {"coreml-fp32": found}, {"coreml-fp32": about}, 2)
    seal(root)
    return root


def seal(root: Path) -> None:
    document = {
        "names": list(NAMES), "imgsz": list(SIZE), "channels": 3, "max_det": 300, "needs_nms": True,
        "packages": {"fp32.mlpackage": "fp32", "fp32-nms.mlpackage": "fp32"},
        "files": {one.relative_to(root).as_posix(): sha256_file(one) for one in root.rglob("*") if one.is_file()},
    }  # fmt: skip
    (root / "coreml.json").write_text(json.dumps(document))


def test_the_check_on_a_mac_passes_and_prints_latency(
    mac: None, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--iterations", "1"], folder) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["package"] for row in rows] == ["fp32.mlpackage", "fp32-nms.mlpackage"]
    assert all(row["golden"] == "passed" and row["latency_p50_ms"] > 0 and row["map50_95"] is None for row in rows)


def test_the_check_fails_for_other_boxes_and_refuses_altered_files(
    mac: None, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ml_program.run
    monkeypatch.setattr(ml_program, "run", lambda *given: [one + 0.05 for one in run(*given)])
    assert command.main(["--iterations", "1"], folder) == 1
    assert "one score off by" in capsys.readouterr().out
    for name in ("other.bin", "other"):
        added = folder / "fp32.mlpackage" / "Data" / name
        added.write_bytes(b"added")
        assert command.main([], folder) == 5
        assert f"{name}: altered" in capsys.readouterr().err
        added.unlink()
    (folder / "fp32.mlpackage" / "Manifest.json").unlink()
    assert command.main([], folder) == 5
    assert "a file that it lists is missing" in capsys.readouterr().err


def test_a_package_with_nms_gives_what_nms_of_the_detector_gives(mac: None, folder: Path, onnx_file: Path) -> None:
    info = EngineInfo("coreml", "fp32", SIZE, NAMES, "", "", options={"channels": 3})
    picture = (images(1, seed=7)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    plain, final = (
        Detector(CoreMLBackend.of_package(folder / f"{name}.mlpackage", info), 0.25, multi_label=False)(picture)
        for name in ("fp32", "fp32-nms")
    )
    assert len(plain) and np.allclose(plain, final, atol=0.05)


def test_the_folder_that_export_writes_is_what_the_check_reads(
    mac: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from yolo_compress.stages import _coreml

    model, folder = net(), tmp_path / "compressed"
    folder.mkdir()
    export_onnx(model, folder / "fp32.onnx", SIZE, names=NAMES)
    export_onnx(model, tmp_path / "opset19.onnx", SIZE, names=NAMES, opset=19)
    state = fold(ptq(model, lambda: [images(2)], "max"), model)
    insert_qdq(tmp_path / "opset19.onnx", tmp_path / "codes.onnx", state, "tensorrt11")
    to_fp16(tmp_path / "codes.onnx", folder / "int8-tensorrt11.onnx", "int8")
    val = []
    for number, one in enumerate(images(2, seed=6)):
        Image.fromarray((one.permute(1, 2, 0).numpy() * 255).astype(np.uint8)).save(tmp_path / f"{number}.png")
        val.append(SimpleNamespace(image=tmp_path / f"{number}.png", name=f"{number}.png"))
    job: Any = SimpleNamespace(
        recipe=SimpleNamespace(
            export=SimpleNamespace(nms=True, precisions=("fp32", "int8")), data=SimpleNamespace(max_det=300)
        ),
        dataset=SimpleNamespace(val=val, names=NAMES, channels=3),
        imgsz_hw=SIZE,
    )
    _coreml.write(job, folder)
    packages = json.loads((folder / "coreml" / "coreml.json").read_text())["packages"]
    assert packages == {f"{one}.mlpackage": one[:4] for one in ("fp32", "fp32-nms", "int8", "int8-nms")}
    command.main(["--iterations", "1"], folder / "coreml")
    rows = {row["package"]: row for row in json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]}
    assert rows["fp32.mlpackage"]["golden"] == rows["fp32-nms.mlpackage"]["golden"] == "passed"
    assert rows["int8.mlpackage"]["executed"] == "int8 (57 int8, 6 fp16; of 63 convolutions), as stored"
    monkeypatch.undo()
    done = subprocess.run([sys.executable, str(folder / "coreml" / "check.py")], capture_output=True, text=True)
    assert done.returncode == 4 and "CoreML runs on macOS alone" in done.stderr
