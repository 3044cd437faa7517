"""Engines agree with torch, say what they executed, and nothing that the sidecar does not vouch for is deserialised."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest

from yolo_compress.evaluate.backend_difference import max_abs_difference
from yolo_compress.evaluate.torch_backend import TorchBackend
from yolo_compress.export.float_onnx import export_onnx
from yolo_compress.export.fp16 import to_fp16
from yolo_compress.runtime.backends.base import SIDECAR, census_words, check_output, describe_onnx, load_info
from yolo_compress.runtime.backends.litert import LiteRtBackend
from yolo_compress.runtime.backends.ncnn import NcnnBackend
from yolo_compress.runtime.backends.onnx_metadata import metadata, names_and_imgsz
from yolo_compress.runtime.backends.openvino import OpenVINOBackend
from yolo_compress.runtime.backends.ort import OrtBackend
from yolo_compress.runtime.detect.detector import Detector
from yolo_compress.runtime.engine import BACKENDS, open_engine
from yolo_compress.runtime.errors import EngineError, RuntimeUnavailable
from yolo_compress.train import checkpoint

NAMES = ("bolt", "nut", "screw")
IMGSZ = (64, 96)
ONNX: dict[str, Any] = {"onnxruntime": OrtBackend, "openvino": OpenVINOBackend}  # they also open an ONNX file
CPU: dict[str, Any] = {**ONNX, "litert": LiteRtBackend, "ncnn": NcnnBackend}
FILE = {"onnxruntime": "engine.onnx", "openvino": "engine.bin", "litert": "engine.tflite", "ncnn": "engine.bin"}


@pytest.fixture(scope="module")
def model() -> Any:
    net = checkpoint.new_model("yolov8n.yaml", NAMES, 3, seed=0)
    return net.eval()


@pytest.fixture(scope="module")
def exported(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("onnx")
    files = {name: folder / f"{name}.onnx" for name in ("fp32", "fp16", "dynamic")}
    export_onnx(model, files["fp32"], IMGSZ, names=NAMES)
    export_onnx(model, files["dynamic"], IMGSZ, names=NAMES, dynamic_batch=True)
    to_fp16(files["fp32"], files["fp16"])
    return files


@pytest.fixture(scope="module")
def engines(exported: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    folder = tmp_path_factory.mktemp("engines")
    built = {}
    for runtime, backend in CPU.items():
        for precision in ("fp32", "fp16"):
            out = folder / f"{runtime}-{precision}"
            files = backend.build(exported[precision], out, precision)
            assert sorted(files) == sorted(path.name for path in out.iterdir()), "every file is accounted for"
            built[runtime, precision] = out
    return built


def images(count: int = 3) -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    return [generator.random((3, *IMGSZ), dtype=np.float32) for _ in range(count)]


@pytest.mark.parametrize("runtime", CPU)
def test_fp32_engines_equal_torch(runtime: str, model: Any, engines: dict[tuple[str, str], Path]) -> None:
    with TorchBackend(model, NAMES, IMGSZ) as torch_side, open_engine(engines[runtime, "fp32"], threads=1) as engine:
        assert (engine.names, engine.imgsz, engine.precision, engine.batch) == (NAMES, IMGSZ, "fp32", 1)
        assert engine.executed == "fp32"
        apart = max_abs_difference(torch_side, engine, images())
    assert apart["scores"] < 1e-4 and apart["boxes_px"] < 1e-2 and apart["images"] == 3


@pytest.mark.parametrize("runtime", CPU)
def test_fp16_engines_are_near_torch_and_say_what_ran(
    runtime: str, model: Any, engines: dict[tuple[str, str], Path]
) -> None:
    with TorchBackend(model, NAMES, IMGSZ) as torch_side, open_engine(engines[runtime, "fp16"], threads=1) as engine:
        assert engine.precision == "fp16"
        apart = max_abs_difference(torch_side, engine, images())
        executed = engine.executed
    assert apart["scores"] < 2e-2 and apart["boxes_px"] < 2
    kind = executed.split()[0]
    assert kind in ("fp32", "fp16", "bf16") and (executed == "fp16" or len(executed) > len(kind)), executed
    if runtime == "onnxruntime" and kind == "fp32":
        assert executed.startswith("fp32 (fp16 weights, ") and executed.endswith(" casts)")


@pytest.mark.parametrize("runtime", ONNX)
def test_a_dynamic_batch_gives_what_single_images_give(
    runtime: str, exported: dict[str, Path], engines: dict[tuple[str, str], Path]
) -> None:
    with CPU[runtime](exported["dynamic"], threads=1) as many, CPU[runtime](engines[runtime, "fp32"], threads=1) as one:
        assert many.batch is None
        together = many(np.stack(images()))
        for index, image in enumerate(images()):
            assert np.allclose(together[index], one(image[None])[0], atol=1e-3)


@pytest.mark.parametrize("runtime", CPU)
def test_bound_calls_run_and_outputs_are_copies(runtime: str, engines: dict[tuple[str, str], Path]) -> None:
    with open_engine(engines[runtime, "fp32"], threads=1) as engine:
        first, second = images(2)
        kept = engine(first[None])
        expected = kept.copy()
        call = engine.bind(second[None])
        call()
        engine(second[None])
        assert np.array_equal(kept, expected), "an earlier output is not overwritten"
        assert np.array_equal(engine(first[None]), expected)
        assert np.array_equal(engine(first[None], copy=False), expected)


def test_engines_that_share_the_processors_are_bound_to_none(
    exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("yolo_compress.runtime.backends.openvino.usable_cpus", lambda: 2)
    with OpenVINOBackend(exported["fp32"], threads=1) as engine:
        assert engine._compiled.get_property("ENABLE_CPU_PINNING") is False


@pytest.mark.fault(77)
@pytest.mark.parametrize("runtime", ONNX)
def test_a_detector_finds_the_same_at_any_batch(runtime: str, exported: dict[str, Path]) -> None:
    pictures = [(255 * image.transpose(1, 2, 0)).astype(np.uint8) for image in images(3)]
    pictures[1] = pictures[1][:40, :50]
    with CPU[runtime](exported["fp32"], 1) as one, CPU[runtime](exported["dynamic"], 1) as many:
        alone = [Detector(one, multi_label=False)(picture) for picture in pictures]
        together = Detector(many, multi_label=False).detect(pictures)
    for expected, found in zip(alone, together, strict=True):
        assert len(found) == len(expected) > 0 and np.allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("runtime", [*CPU, "torch"])
@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((1, 3, *IMGSZ), np.float64),
        np.zeros((1, 3, *IMGSZ), np.uint8),
        np.zeros((1, 3, 96, 64), np.float32),
        np.zeros((3, *IMGSZ), np.float32),
    ],
)
def test_wrong_images_are_refused_in_words(
    runtime: str, wrong: np.ndarray, model: Any, engines: dict[tuple[str, str], Path]
) -> None:
    opened = TorchBackend(model, NAMES, IMGSZ) if runtime == "torch" else open_engine(engines[runtime, "fp32"])
    with opened as backend:
        for use in (backend, backend.bind):
            with pytest.raises(ValueError, match=r"expected float32 \[.*3, 64, 96\]"):
                use(wrong)


@pytest.mark.parametrize("runtime", CPU)
def test_a_batch_that_the_engine_was_not_built_for_is_refused(
    runtime: str, engines: dict[tuple[str, str], Path]
) -> None:
    with (
        open_engine(engines[runtime, "fp32"]) as engine,
        pytest.raises(ValueError, match=r"float32 \[2, 3, 64, 96\], expected float32 \[1, 3, 64, 96\]"),
    ):
        engine(np.stack(images(2)))


# ---- the sidecar


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the libraries were asked to deserialise."""
    asked: list[str] = []
    session, read = onnxruntime.InferenceSession, openvino.Core.read_model

    def spy_session(path: Any, *rest: Any, **more: Any) -> Any:
        asked.append("onnxruntime")
        return session(path, *rest, **more)

    def spy_read(self: Any, *rest: Any, **more: Any) -> Any:
        asked.append("openvino")
        return read(self, *rest, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", spy_session)
    monkeypatch.setattr(openvino.Core, "read_model", spy_read)
    return asked


def copy_of(engine: Path, target: Path) -> Path:
    target.mkdir()
    for file in engine.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def edited(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads((directory / SIDECAR).read_text())
    change(document)
    (directory / SIDECAR).write_text(json.dumps(document))


def flip_a_byte(directory: Path, file: str) -> None:
    data = bytearray((directory / file).read_bytes())
    data[len(data) // 2] ^= 1
    (directory / file).write_bytes(data)


def escape(directory: Path, file: str, to: str) -> None:
    (directory.parent / file).write_bytes((directory / file).read_bytes())
    edited(directory, lambda d: d["files"].update({to: d["files"].pop(file)}))


DAMAGE: dict[str, tuple[Callable[[Path, str], Any], str]] = {
    "altered": (flip_a_byte, "altered"),
    "truncated": (lambda d, f: (d / f).write_bytes((d / f).read_bytes()[:-100]), "truncated"),
    "emptied": (lambda d, f: (d / f).write_bytes(b""), "truncated"),
    "missing": (lambda d, f: (d / f).unlink(), "missing"),
    "no sidecar": (lambda d, f: (d / SIDECAR).unlink(), "not an engine directory"),
    "sidecar cut": (lambda d, f: (d / SIDECAR).write_text((d / SIDECAR).read_text()[:80]), "damaged"),
    "sidecar binary": (lambda d, f: (d / SIDECAR).write_bytes(b"\xff\xfe\x00"), "damaged"),
    "sidecar a list": (lambda d, f: (d / SIDECAR).write_text("[1]"), "damaged"),
    "sidecar deep": (lambda d, f: (d / SIDECAR).write_text("[" * 100_000), "damaged"),
    "size of no end": (lambda d, f: edited(d, lambda s: s.update(imgsz=[float("inf"), 64])), "damaged"),
    "no hash": (lambda d, f: edited(d, lambda s: s["files"][f].pop("sha256")), "damaged"),
    "files a list": (lambda d, f: edited(d, lambda s: s.update(files=[f])), "damaged"),
    "unknown field": (lambda d, f: edited(d, lambda s: s.update(extra=1)), "damaged"),
    "no files": (lambda d, f: edited(d, lambda s: s.update(files={})), "0 files"),
    "engine not vouched for": (lambda d, f: edited(d, lambda s: s["files"].pop(f) and s["files"].update({})), "has no entry|0 files"),
    "other schema": (lambda d, f: edited(d, lambda s: s.update(schema=2)), "schema 2"),
    "other precision": (lambda d, f: edited(d, lambda s: s.update(precision="fp8")), "fp8"),
    "other runtime": (lambda d, f: edited(d, lambda s: s.update(runtime="tflite")), "tflite"),
    "parent": (lambda d, f: escape(d, f, f"../{f}"), "leaves the directory"),
    "absolute": (lambda d, f: escape(d, f, str(d.parent / f)), "leaves the directory"),
    "below": (lambda d, f: escape(d, f, f"x/../{f}"), "leaves the directory"),
    "dots": (lambda d, f: escape(d, f, ".."), "leaves the directory"),
}  # fmt: skip


@pytest.mark.fault(30)
@pytest.mark.parametrize("runtime", CPU)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_engines_are_refused_before_the_library_sees_them(
    runtime: str, damage: str, engines: dict[tuple[str, str], Path], spied: list[str], tmp_path: Path
) -> None:
    directory = copy_of(engines[runtime, "fp32"], tmp_path / "engine")
    harm, words = DAMAGE[damage]
    harm(directory, FILE[runtime])
    for opener in (open_engine, CPU[runtime]):
        with pytest.raises(EngineError, match=words):
            opener(directory)
    assert not spied


@pytest.mark.fault(30)
def test_an_engine_file_beside_a_valid_sidecar_of_other_files_is_refused(
    engines: dict[tuple[str, str], Path], spied: list[str], tmp_path: Path
) -> None:
    directory = copy_of(engines["openvino", "fp32"], tmp_path / "engine")
    edited(directory, lambda document: document["files"].pop("engine.xml"))
    with pytest.raises(EngineError, match=r"has no entry for engine\.xml"):
        open_engine(directory)
    assert not spied


@pytest.mark.fault(30)
def test_another_runtime_precision_or_source_is_refused(engines: dict[tuple[str, str], Path], spied: list[str]) -> None:
    with pytest.raises(EngineError, match="of openvino, not of onnxruntime"):
        OrtBackend(engines["openvino", "fp32"])
    with pytest.raises(EngineError, match="holds fp16, expected fp32"):
        OpenVINOBackend(engines["openvino", "fp16"], precision="fp32")
    with pytest.raises(EngineError, match="built from ONNX"):
        open_engine(engines["onnxruntime", "fp32"], onnx_sha256="0" * 64)
    assert not spied


def test_the_right_source_is_accepted(engines: dict[tuple[str, str], Path], exported: dict[str, Path]) -> None:
    sha256 = describe_onnx(exported["fp32"], "onnxruntime", "fp32", "any").onnx_sha256
    for runtime in CPU:
        info = load_info(engines[runtime, "fp32"], sha256)
        assert info.onnx_sha256 == sha256 and info.runtime == runtime and info.library and info.built_on["cpu"]


def test_threads_mean_nothing_to_tensorrt(engines: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    directory = copy_of(engines["onnxruntime", "fp32"], tmp_path / "engine")
    edited(directory, lambda document: document.update(runtime="tensorrt"))
    with pytest.raises(EngineError, match="threads=2 has no effect"):
        open_engine(directory, threads=2)


# ---- building


@pytest.mark.parametrize("runtime", CPU)
def test_int8_of_a_float_graph_is_refused_and_leaves_nothing(
    runtime: str, exported: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match="no Q/DQ nodes"):
        CPU[runtime].build(exported["fp32"], tmp_path / "engine", "int8")
    assert not (tmp_path / "engine" / SIDECAR).exists()


@pytest.mark.parametrize("runtime", CPU)
def test_what_cannot_be_built_is_named(runtime: str, exported: dict[str, Path], tmp_path: Path) -> None:
    build = CPU[runtime].build
    with pytest.raises(EngineError, match=r"absent\.onnx: no such ONNX file"):
        build(tmp_path / "absent.onnx", tmp_path / "engine", "fp32")
    with pytest.raises(EngineError, match="precision 'fp8'"):
        build(exported["fp32"], tmp_path / "engine", "fp8")
    (tmp_path / "cut.onnx").write_bytes(exported["fp32"].read_bytes()[:5000])
    with pytest.raises(EngineError, match=r"cut\.onnx: not a readable ONNX"):
        build(tmp_path / "cut.onnx", tmp_path / "engine", "fp32")
    with pytest.raises(EngineError, match="output .*8 expected|output .*, 8, anchors"):
        build(exported["fp32"], tmp_path / "engine", "fp32", names=("a", "b", "c", "d"))
        CPU[runtime](tmp_path / "engine")


@pytest.mark.parametrize("runtime", CPU)
def test_a_size_that_contradicts_the_graph_is_refused(runtime: str, exported: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="takes .*64.*96.* px, its metadata says"):
        CPU[runtime].build(exported["fp32"], tmp_path / "engine", "fp32", imgsz=(96, 96))
        CPU[runtime](tmp_path / "engine")


def test_half_typed_ends_are_refused(exported: dict[str, Path], tmp_path: Path) -> None:
    graph = onnx.load(str(exported["fp16"]))
    (cast,) = [node for node in graph.graph.node if node.input[0] == "images"]
    graph.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    cast.op_type = "Identity"
    del cast.attribute[:]
    onnx.save(graph, str(tmp_path / "half.onnx"))
    with pytest.raises(EngineError, match=r"tensor\(float\) expected"):
        OrtBackend(tmp_path / "half.onnx")


def test_metadata_is_read_without_onnx(exported: dict[str, Path]) -> None:
    props = {item.key: item.value for item in onnx.load(str(exported["fp32"])).metadata_props}
    assert metadata(exported["fp32"]) == props
    assert names_and_imgsz(exported["fp32"]) == (NAMES, IMGSZ)


def test_an_onnx_without_metadata_wants_names_and_size(exported: dict[str, Path], tmp_path: Path) -> None:
    graph = onnx.load(str(exported["fp32"]))
    del graph.metadata_props[:]
    bare = tmp_path / "bare.onnx"
    onnx.save(graph, str(bare))
    with pytest.raises(EngineError, match="pass names and imgsz"):
        OrtBackend(bare)
    OrtBackend.build(bare, tmp_path / "engine", "fp32", names=NAMES, imgsz=IMGSZ)
    with open_engine(tmp_path / "engine", threads=1) as engine:
        assert engine.names == NAMES and engine.imgsz == IMGSZ


def test_graph_optimisation_is_a_choice(exported: dict[str, Path]) -> None:
    image = images(1)[0][None]
    with OrtBackend(exported["fp32"], 1, optimisation="none") as plain, OrtBackend(exported["fp32"], 1) as full:
        assert np.allclose(plain(image), full(image), atol=1e-3)
    with pytest.raises(EngineError, match="optimisation 'max'"):
        OrtBackend(exported["fp32"], optimisation="max")


# ---- words and probes


@pytest.mark.parametrize(
    ("precision", "counts", "words"),
    [
        ("fp32", {"fp32": 64}, "fp32"),
        ("int8", {"int8": 57, "fp32": 7}, "int8 (57 int8, 7 fp32; of 64 convolutions)"),
        ("fp32", {"bf16": 64}, "bf16 (all 64 convolutions; fp32 asked)"),
        ("int8", {}, "int8 asked; no convolution could be read from the library's report"),
    ],
)
def test_census_says_what_ran(precision: str, counts: dict[str, int], words: str) -> None:
    assert census_words(precision, counts) == words


def test_an_output_with_nms_in_the_graph_is_refused(exported: dict[str, Path]) -> None:
    info = describe_onnx(exported["fp32"], "onnxruntime", "fp32", "any")
    check_output(info, ["batch", 7, "anchors"], exported["fp32"])
    check_output(info, (-1, 7, 126), exported["fp32"])
    for shape in ([1, 300, 6], [1, 8, 126], [7, 126]):
        with pytest.raises(EngineError, match="without NMS"):
            check_output(info, shape, exported["fp32"])


@pytest.mark.fault(62)
def test_probes_are_silent_where_it_works_and_hint_where_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert OrtBackend.probe() is None and OpenVINOBackend.probe() is None
    for name in ("onnxruntime", "openvino", "tensorrt"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install onnxruntime" in (OrtBackend.probe() or "")
    assert "pip install openvino" in (OpenVINOBackend.probe() or "")
    assert "pip install tensorrt" in (BACKENDS["tensorrt"].probe() or "")
    with pytest.raises(RuntimeUnavailable, match="onnxruntime does not import"):
        OrtBackend(Path("engine"))


FIRST_AT_ONCE = """
import sys, threading
from pathlib import Path
import numpy as np
from yolo_compress.runtime.backends.openvino import OpenVINOBackend

sys.setswitchinterval(1e-6)
engines = [OpenVINOBackend(Path(sys.argv[1]), threads=1) for _ in range(2)]
start = threading.Barrier(2)
blank_BCHW = np.zeros((1, 3, *engines[0].imgsz), np.float32)
threads = [threading.Thread(target=lambda e=engine: (start.wait(), e(blank_BCHW))) for engine in engines]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


@pytest.mark.slow
def test_two_engines_whose_first_inference_comes_at_once(engines: dict[tuple[str, str], Path]) -> None:
    """OpenVINO 2026.4 sets up types at the first tensor: two threads that did so at once hung in 10 of 12 processes."""
    for _ in range(3):
        command = [sys.executable, "-c", FIRST_AT_ONCE, str(engines["openvino", "fp32"])]
        assert subprocess.run(command, timeout=60, check=False).returncode == 0
