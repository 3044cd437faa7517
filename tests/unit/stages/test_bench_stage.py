"""Each exported file has a row of its own in the bench, also if the engine of its runtime was built from another file."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from yolo_compress.evaluate.exported_files import made_for
from yolo_compress.evaluate.stored_detections import row_name
from yolo_compress.report import numbers
from yolo_compress.stages import bench

FILES = ("compressed/fp32.onnx", "compressed/int8-openvino.onnx", "compressed/int8.onnx")


def test_the_own_file_of_a_runtime_that_was_built_from_another() -> None:
    export = SimpleNamespace(manifest=SimpleNamespace(files=dict.fromkeys(FILES)), file=Path)
    model = SimpleNamespace(metrics={"parameters": 1, "compute_gflops": 1.0})
    job: Any = SimpleNamespace(inputs={"export": export, "baseline": model, "distill": model})

    def names(built_from: str) -> dict[str, tuple[str, Path]]:
        source: Any = model
        engines = [
            bench._Candidate(
                bench._subject("compressed", "openvino", "fp32", source, FILES[0]), path="a", size_mib=1.0
            ),
            bench._Candidate(
                bench._subject("compressed", "openvino", "int8", source, built_from), path="b", size_mib=1.0
            ),
        ]
        rows = bench._with_exported_files(job, engines)
        return {row_name(row.subject): (row.status, Path(str(row.path))) for row in rows}

    timed = {"compressed-openvino-fp32": ("ok", Path("a")), "compressed-openvino-int8": ("ok", Path("b"))}
    target = made_for(FILES[2])
    assert target is not None
    tensorrt = {f"compressed-{target.runtime}-int8": ("untimed", Path(FILES[2]))}
    assert names(FILES[1]) == {**timed, **tensorrt}
    assert names(FILES[2]) == {**timed, **tensorrt, "compressed-openvino-own-int8": ("untimed", Path(FILES[1]))}
    assert numbers.runtime("openvino-own") == "OpenVINO, its own file"
