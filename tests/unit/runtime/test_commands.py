"""The bundle's commands: refused bundles are not touched, engines are of the bundle, and what they print and write is what it is."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.support.bundled import CONF, NAMES, make_bundle, pictures
from tests.support.typed import validate
from tests.unit.runtime.test_sources import Capture
from yolo_compress.evaluate.cascade.write import fill, policy_json
from yolo_compress.runtime import engine, registry
from yolo_compress.runtime.backends.base import load_info, save_info
from yolo_compress.runtime.backends.ort import OrtBackend
from yolo_compress.runtime.commands import bench, build, detect, device_json
from yolo_compress.runtime.commands import bundle as bundle_module
from yolo_compress.runtime.detect.cascade import FEATURES
from yolo_compress.runtime.detect.detector import Detector
from yolo_compress.runtime.engine import open_engine
from yolo_compress.runtime.errors import EngineError, RuntimeUnavailable
from yolo_compress.runtime.measure import golden, jetson, layer_times
from yolo_compress.runtime.secure import ed25519
from yolo_compress.runtime.secure.signed_manifest import BundleRefused, seal

COMMANDS: dict[str, tuple[Callable[..., int], list[str]]] = {
    "build": (build.main, ["--runtime", "onnxruntime"]),
    "bench": (bench.main, ["--golden"]),
    "detect": (detect.main, ["0.npy", "--conf", str(CONF)]),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose engine is built."""
    root = make_bundle(tmp_path_factory.mktemp("robot") / "bundle")
    assert build.main(COMMANDS["build"][1], root) == 0
    return root


@pytest.fixture
def bundle(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("YOLO_COMPRESS_KEY", raising=False)
    return Path(shutil.copytree(made, tmp_path / "bundle"))


@pytest.fixture
def touched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happened: `verified` when the bundle is, `engine` when an engine library is given a file."""
    events: list[str] = []
    really, opens, builds = bundle_module.verify, OrtBackend.__init__, OrtBackend.build

    def verify(*arguments: Any) -> dict[str, Any]:
        manifest = really(*arguments)
        events.append("verified")
        return manifest

    def opened(*arguments: Any, **options: Any) -> None:
        events.append("engine")
        opens(*arguments, **options)

    def built(*arguments: Any) -> Any:
        events.append("engine")
        return builds(*arguments)

    monkeypatch.setattr(bundle_module, "verify", verify)
    monkeypatch.setattr(OrtBackend, "__init__", opened)
    monkeypatch.setattr(OrtBackend, "build", staticmethod(built))
    return events


def run(command: str, bundle: Path, *more: str) -> int:
    main, words = COMMANDS[command]
    words = [str(bundle / "golden" / word) if word.endswith(".npy") else word for word in words]
    return main([*words, *more], bundle)


@pytest.mark.parametrize("command", COMMANDS)
def test_verified_first_then_touched(command: str, bundle: Path, touched: list[str]) -> None:
    assert run(command, bundle, *(["--force"] if command == "build" else [])) == 0
    assert touched[0] == "verified" and "engine" in touched and touched.count("verified") == 1


def altered(bundle: Path) -> None:
    content = bytearray((bundle / "onnx/fp32.onnx").read_bytes())
    content[5000] ^= 1
    (bundle / "onnx/fp32.onnx").write_bytes(content)


def pinned(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bundle.parent / "bundle.pub").write_text(ed25519.public_key(bytes(32)).hex())
    monkeypatch.setenv("YOLO_COMPRESS_KEY", str(bundle.parent / "bundle.pub"))


def cascade_folder(made: Path, out: Path, threshold: float, foreign: bool = False) -> Path:
    """A policy folder of the bundle's engine and another one; with `foreign`, of two others. Every score of the router is 0."""
    own = made / "engines/onnxruntime-fp32"
    parts = []
    for name in ("small", "large"):
        folder = out.parent / f"engine-{name}"
        if name == "small" and not foreign:
            folder = own
        elif not folder.is_dir():
            shutil.copytree(own, folder)
            info = load_info(folder)
            save_info(replace(info, onnx_sha256="12"[name == "large"] * 64), folder, list(info.files))
        parts.append((folder, load_info(folder)))
    policy = policy_json(parts[0][1], parts[1][1], np.zeros(len(FEATURES)), 0.0, threshold)
    fill(out, policy, *parts)
    return out


def test_detect_takes_a_cascade_of_the_bundle(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("detect", bundle) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["detections"]
    for threshold in (1.0, -1.0):  # never and always the large model, which is the same here
        folder = cascade_folder(bundle, tmp_path / f"cascade{threshold}", threshold)
        assert run("detect", bundle, "--engine", str(folder)) == 0
        assert json.loads(capsys.readouterr().out) == alone
    assert bench.main(["--golden", "--engine", str(folder)], bundle) == 5
    assert "not the cascade of this bundle, so the bundle cannot test it" in capsys.readouterr().err
    other = cascade_folder(bundle, tmp_path / "other", 1.0, foreign=True)
    assert run("detect", bundle, "--engine", str(other)) == 5
    assert "neither engine of the cascade is built from an ONNX file of this bundle" in capsys.readouterr().err
    opened = bundle_module.open_bundle(bundle)
    with pytest.raises(EngineError, match="a cascade, which the pinned key does not cover"):
        bundle_module.engine_folder(replace(opened, pinned=True), str(folder))
    with pytest.raises(EngineError, match="a cascade of classes .*, the bundle has"):
        bundle_module.engine_folder(replace(opened, names=("screw",)), str(folder))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("harm", ["altered", "unsigned", "missing", "extra"])
def test_a_refused_bundle_is_not_touched(
    command: str,
    harm: str,
    bundle: Path,
    touched: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if harm == "altered":
        altered(bundle)
    elif harm == "unsigned":
        pinned(bundle, monkeypatch)
    elif harm == "missing":
        (bundle / "labels.txt").unlink()
    else:
        (bundle / "runtime" / "numpy.py").write_text("")
    assert run(command, bundle) == 5 and touched == []
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1


def test_signed_by_the_pinned_key_it_is_taken(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned(bundle, monkeypatch)
    about = {
        k: v
        for k, v in json.loads((bundle / "manifest.json").read_text()).items()
        if k not in ("files", "schema", "version")
    }
    seal(bundle, about, 4, bytes(32))
    assert run("detect", bundle) == 0


def signed(bundle: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """The bundle, signed by the key that this robot pins."""
    pinned(bundle, monkeypatch)
    manifest = json.loads((bundle / "manifest.json").read_text())
    about = {key: value for key, value in manifest.items() if key not in ("files", "schema", "version")}
    seal(bundle, {**about, **changes}, 4, bytes(32))


def engine_altered(bundle: Path) -> Path:
    """Other bytes beside a valid manifest, and a sidecar that vouches for them."""
    folder = bundle / "engines" / "onnxruntime-fp32"
    info = load_info(folder)
    (folder / "engine.onnx").write_bytes((folder / "engine.onnx").read_bytes() + b"\x7a\x00")
    save_info(info, folder, ["engine.onnx"])
    return folder


@pytest.mark.fault(86)
def test_an_engine_that_came_with_a_signed_bundle_is_not_run(
    bundle: Path,
    tmp_path: Path,
    touched: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The signature covers no engines: those that build.py made here run, others do not, wherever they lie."""
    signed(bundle, monkeypatch)
    assert run("detect", bundle) == 0
    folder = engine_altered(bundle)
    touched.clear()
    for command, more in (("detect", ()), ("bench", ()), ("detect", ("--engine", str(folder)))):
        assert run(command, bundle, *more) == 5 and "engine" not in touched
        assert "not built on this machine by this user" in capsys.readouterr().err
    assert run("build", bundle) == 0 and "up to date" not in capsys.readouterr().err
    assert run("detect", bundle) == 0
    monkeypatch.delenv("YOLO_COMPRESS_KEY")
    engine_altered(bundle)
    assert run("detect", bundle) == 0, "without a key nothing is signed"


def test_in_a_slot_engines_need_no_record(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`install` built them, perhaps as root, and took none from outside."""
    signed(bundle, monkeypatch)
    monkeypatch.setenv("YOLO_COMPRESS_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
    slot = Path(shutil.copytree(bundle, tmp_path / "root" / "slots" / "a"))
    assert run("detect", slot) == 0 and run("detect", bundle) == 5


def test_a_record_that_cannot_be_written_matters_where_a_key_is_pinned(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/proc")
    assert run("build", bundle, "--force") == 0 == run("detect", bundle)
    signed(bundle, monkeypatch)
    capsys.readouterr()
    assert run("build", bundle) == 6 and "error: /proc/yolo_compress: " in capsys.readouterr().err
    assert load_info(bundle / "engines" / "onnxruntime-fp32"), "and what was there stays"
    assert run("detect", bundle) == 5


@pytest.mark.fault(85)
def test_a_bundle_of_another_product_than_the_slots_is_not_run(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    signed(bundle, monkeypatch)
    slots = tmp_path / "root" / "slots"
    slots.mkdir(parents=True)
    (tmp_path / "root" / "current").symlink_to("slots/a")
    monkeypatch.setenv("YOLO_COMPRESS_ROOT", str(tmp_path / "root"))
    for name, code in (("tiny", 0), ("forklift", 5)):
        (slots / "a.json").write_text(json.dumps({"name": name, "version": 3, "manifest_sha256": "0" * 64}))
        assert run("detect", bundle) == code
    assert "of 'tiny', but " in capsys.readouterr().err


def test_a_result_names_the_model_that_was_measured(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signed(bundle, monkeypatch, recipe_fingerprint="ab" * 32)
    digest = hashlib.sha256((bundle / "onnx/fp32.onnx").read_bytes()).hexdigest()
    about = bundle_module.open_bundle(bundle).about()
    assert about["onnx"] == {"fp32": digest} and about["recipe_fingerprint"] == "ab" * 32


def test_a_name_with_a_control_sequence_is_shown_as_text(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    signed(bundle, monkeypatch, name="\x1b]0;pwned\x07", names=["\x9b31mbolt", "nut", "screw"])
    assert run("detect", bundle) == 0
    assert all(c.isprintable() or c == "\n" for text in capsys.readouterr() for c in text)


@pytest.mark.fault(83)
def test_a_lost_camera_is_no_success(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Capture, "frames", 9)
    monkeypatch.setattr(cv2, "VideoCapture", Capture)
    assert detect.main(["0"], bundle) == 3
    out, err = capsys.readouterr()
    assert out.count("\n") == 9 and err.splitlines()[-1].startswith("error: camera 0: lost after 9 frames")


def test_older_than_what_ran_here_it_is_taken_in_its_slot_alone(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pinned(bundle, monkeypatch)
    manifest = json.loads((bundle / "manifest.json").read_text())
    about = {key: value for key, value in manifest.items() if key not in ("files", "schema", "version")}
    root = tmp_path / "root"
    monkeypatch.setenv("YOLO_COMPRESS_ROOT", str(root))
    for newest, code in ((None, 0), (3, 0), (4, 0), (5, 5)):
        seal(bundle, about, 4, bytes(32))
        if newest is not None:
            root.mkdir(exist_ok=True)
            (root / "state.json").write_text(json.dumps({"schema": 1, "newest": newest}))
        assert run("detect", bundle) == code
    assert "version 4, but 5 ran on this robot already" in capsys.readouterr().err
    (root / "slots").mkdir()
    slot = Path(shutil.copytree(bundle, root / "slots" / "a"))
    assert run("detect", slot) == 0


def test_a_manifest_that_describes_no_bundle_is_refused(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seal(bundle, {"name": "a", "onnx": {"fp32": "onnx/gone.onnx"}, "names": ["a"], "imgsz": [64, 96]}, 4, None)
    assert run("detect", bundle) == 5 and "'onnx/gone.onnx', which has no entry in `files`" in capsys.readouterr().err
    seal(bundle, {"name": "a"}, 4, None)
    assert run("detect", bundle) == 5 and "does not describe a bundle" in capsys.readouterr().err


def test_build_says_on_what_it_built_and_reuses_what_is_up_to_date(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = bundle / "engines" / "onnxruntime-fp32"
    built = json.loads((folder / "build.json").read_text())
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert built["onnx_sha256"] == manifest["files"]["onnx/fp32.onnx"]["sha256"] == load_info(folder).onnx_sha256
    assert built["bundle"]["version"] == 3 and built["device"]["cpu"] and built["library"] and built["seconds"] >= 0
    assert run("build", bundle) == 0
    out, err = capsys.readouterr()
    assert "onnxruntime-fp32: up to date" in err and json.loads(out)["engines"][0]["seconds"] is None
    (folder / "engine.onnx").write_bytes(b"damaged")
    assert run("build", bundle) == 0 and json.loads(capsys.readouterr().out)["engines"][0]["seconds"] is not None
    assert load_info(folder).runtime == "onnxruntime"
    assert not [entry.name for entry in folder.parent.iterdir() if entry.name != folder.name]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--precision", "int8"], "no int8 ONNX for onnxruntime"),
        (["--workspace-mib", "64", "--force"], "are for TensorRT; --runtime is onnxruntime"),
        (["--int8-images"], "--int8-images is for INT8 engines of litert; --runtime is onnxruntime, --precision fp32"),
    ],
)
def test_what_cannot_be_built_is_said(
    words: list[str], message: str, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("build", bundle, *words) == 5 and message in capsys.readouterr().err


def test_an_option_that_means_nothing_here_is_no_up_to_date(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("build", bundle, "--workspace-mib", "64") == 5
    assert "are for TensorRT; --runtime is onnxruntime" in capsys.readouterr().err


class Probed:
    def __init__(self, problem: str | None) -> None:
        self.problem = problem

    def probe(self) -> str | None:
        return self.problem


def test_runtimes_that_work_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def here(**problems: str | None) -> None:
        missing = {name: f"no {name}" for name in registry.names()}
        monkeypatch.setattr(build, "BACKENDS", {name: Probed(one) for name, one in (missing | problems).items()})

    here(onnxruntime=None, openvino=None, tensorrt=None)
    assert build.choose_runtimes(None) == ["tensorrt"]
    assert build.choose_runtimes(["openvino", "openvino"]) == ["openvino"]
    here(onnxruntime=None, openvino="no openvino", tensorrt="no tensorrt")
    assert build.choose_runtimes(None) == ["onnxruntime"]
    with pytest.raises(RuntimeUnavailable, match="no openvino"):
        build.choose_runtimes(["openvino"])
    monkeypatch.setattr(jetson, "state", lambda: {"l4t": "# R36"})
    with pytest.raises(RuntimeUnavailable, match="a Jetson without TensorRT: no tensorrt"):
        build.choose_runtimes(None)
    here(onnxruntime="no onnxruntime", openvino="no openvino", tensorrt="no tensorrt")
    monkeypatch.setattr(jetson, "state", dict)
    with pytest.raises(RuntimeUnavailable, match="no onnxruntime; no openvino; no tensorrt"):
        build.choose_runtimes(None)


def test_the_files_that_a_runtime_can_be_built_from(monkeypatch: pytest.MonkeyPatch) -> None:
    stems = ["fp32", "fp16", "int8", "int8-tensorrt11", "int8-onnxruntime", "int8-openvino"]
    monkeypatch.setattr("yolo_compress.runtime.backends.tensorrt.run.strongly_typed", lambda: False)
    assert engine.onnx_forms(stems, "tensorrt", "int8") == ["int8"]
    assert engine.onnx_forms(stems, "openvino", "fp16") == ["fp16"]
    assert engine.onnx_forms(stems, "openvino", "int8") == ["int8-openvino", "int8"]
    assert engine.onnx_forms(stems[:3], "openvino", "int8") == ["int8"]
    assert engine.onnx_forms(stems, "onnxruntime", "int8") == ["int8-onnxruntime"]
    monkeypatch.setattr("yolo_compress.runtime.backends.tensorrt.run.strongly_typed", lambda: True)
    assert engine.onnx_forms(stems, "tensorrt", "int8") == ["int8-tensorrt11"]
    assert engine.onnx_forms(["fp32"], "tensorrt", "int8") == []


def test_the_default_engine_is_the_fastest_here_then_where_the_bundle_was_made(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed(bundle, monkeypatch, fastest=["openvino-fp16", "openvino-int8", "onnxruntime-int8"])
    opened = bundle_module.open_bundle(bundle)
    engines = ["onnxruntime-fp32", "onnxruntime-int8", "openvino-fp16", "openvino-int8"]

    def first() -> list[str]:
        return bundle_module.fastest_first(opened, engines)

    assert first() == ["openvino-fp16", "openvino-int8", "onnxruntime-int8", "onnxruntime-fp32"]
    assert bundle_module.fastest_first(opened, [*engines, "tensorrt-int8"])[0] == "tensorrt-int8", "a GPU"
    rows = [
        {
            "runtime": "onnxruntime",
            "precision": "fp32",
            "status": "ok",
            "latency_p50_ms": 2.0,
            "golden": {"passed": True},
        },
        {
            "runtime": "onnxruntime",
            "precision": "int8",
            "status": "ok",
            "latency_p50_ms": 3.0,
            "golden": {"passed": True},
        },
        {
            "runtime": "openvino",
            "precision": "int8",
            "status": "ok",
            "latency_p50_ms": 1.0,
            "golden": {"passed": False},
        },
        {"runtime": "openvino", "precision": "fp16", "status": "missing", "latency_p50_ms": None, "golden": None},
    ]
    document = {"bundle": opened.about(), "rows": rows}
    (bundle / "device.json").write_text(json.dumps(document))
    assert first() == ["onnxruntime-fp32", "onnxruntime-int8", "openvino-fp16", "openvino-int8"]
    (bundle / "device.json").write_text(
        json.dumps({**document, "bundle": {**opened.about(), "manifest_sha256": "0" * 64}})
    )
    assert first()[0] == "openvino-fp16", "measured with another bundle"
    (bundle / "device.json").unlink()
    signed(bundle, monkeypatch, fastest=[])
    assert bundle_module.fastest_first(bundle_module.open_bundle(bundle), engines)[0] == "openvino-int8"
    for malformed in (1, [1], "openvino"):
        signed(bundle, monkeypatch, fastest=malformed)
        with pytest.raises(BundleRefused, match="fastest"):
            bundle_module.open_bundle(bundle)


def test_detect_prints_what_the_detector_finds(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, picture in enumerate(pictures()):
        Image.fromarray(picture).save(bundle.parent / f"{number}.png")
    shadow = tmp_path / "shadow.jsonl"
    shadow.write_text("earlier\n")
    words = [str(bundle.parent), "--conf", str(CONF), "--shadow", str(shadow), "--draw", str(tmp_path / "drawn")]
    assert detect.main(words, bundle) == 0
    out, err = capsys.readouterr()
    rows, frames = [json.loads(row) for row in out.splitlines()], shadow.read_text().splitlines()
    assert frames.pop(0) == "earlier" and "tiny 3, engine onnxruntime-fp32" in err
    with open_engine(bundle / "engines" / "onnxruntime-fp32") as opened:
        detector = Detector(opened, CONF, multi_label=False)
        for picture, row, text in zip(pictures(), rows, map(json.loads, frames), strict=True):
            expected = detector(picture)
            boxes = [[*box["box"], box["score"], NAMES.index(box["class"])] for box in row["detections"]]
            assert len(expected) and np.allclose(boxes, expected, atol=0.006)
            assert np.allclose(text["detections"], expected, atol=0.006) and text["model"] == {
                "name": "tiny",
                "version": 3,
            }
            assert text["frame"] == row["picture"] and text["problem"] is None and text["ms"] > 0 and text["at"] > 1.7e9
            assert set(text) == {"schema", "frame", "at", "model", "ms", "detections", "problem"}
    assert sorted(file.name for file in (tmp_path / "drawn").iterdir()) == ["0.png.jpg", "1.png.jpg"]
    assert detect.main([str(bundle.parent), "--limit", "1"], bundle) == 0 and capsys.readouterr().out.count("\n") == 1


def test_an_unreadable_picture_is_named_and_logged(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,)}")
    shadow = tmp_path / "shadow.jsonl"
    assert detect.main([str(tmp_path / "bad.npy"), "--shadow", str(shadow)], bundle) == 3
    assert "1 images could not be read" in capsys.readouterr().err
    assert "bad.npy" in json.loads(shadow.read_text())["problem"], "and no pickle was opened"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["gone.png"], 3, "gone.png: no such file"),
        (
            ["{golden}", "--engine", "tensorrt-int8"],
            4,
            "no engine 'tensorrt-int8', there are onnxruntime-fp32; run python3 build.py",
        ),
        (["{golden}", "--engine", "./gone"], 5, "gone/engine.json: No such file"),
        (["{golden}", "--shadow", "/nowhere/log"], 6, "/nowhere/log: No such file"),
    ],
)
def test_what_is_wrong_is_said(
    words: list[str], code: int, message: str, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert detect.main([word.format(golden=bundle / "golden" / "0.npy") for word in words], bundle) == code
    out, err = capsys.readouterr()
    assert out == "" and message in err.splitlines()[-1]


def test_an_engine_of_another_bundle_is_not_used(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (bundle / "onnx/fp32.onnx").write_bytes((bundle / "onnx/fp32.onnx").read_bytes() + b"\x7a\x00")
    about = {
        k: v
        for k, v in json.loads((bundle / "manifest.json").read_text()).items()
        if k not in ("files", "schema", "version")
    }
    seal(bundle, about, 4, None)
    assert run("detect", bundle) == 5 and "which is not of this bundle; run python3 build.py" in capsys.readouterr().err
    shutil.rmtree(bundle / "engines")
    assert run("detect", bundle) == 4 and "no engine; run python3 build.py" in capsys.readouterr().err


@pytest.mark.slow
def test_bench_writes_device_json(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("images", "labels"):
        (tmp_path / "val" / kind).mkdir(parents=True)
    for number, picture in enumerate(pictures()):
        Image.fromarray(picture).save(tmp_path / "val/images" / f"{number}.png")
    (tmp_path / "val/labels/0.txt").write_text("0 .5 .5 .4 .4\n")
    monkeypatch.setattr(bench, "THROUGHPUT_S", 0.3)
    monkeypatch.setattr(bench, "END_TO_END", 70)
    assert bench.main(["--data", str(tmp_path / "val"), "--iterations", "80"], bundle) == 0
    document = json.loads((bundle / "device.json").read_text())
    row, *others = document["rows"]
    validate({**document, "rows": [row]}, device_json.Document)
    for one in others:  # every other key is there, as null
        assert set(one) == set(row)
        validate({key: value for key, value in one.items() if value is not None}, device_json.MissingRow)
    assert document["schema"] == 1 and document["bundle"]["version"] == 3 and document["golden"]["passed"]
    assert (row["model"], row["runtime"], row["precision"], row["executed"]) == (
        "compressed",
        "onnxruntime",
        "fp32",
        "fp32",
    )
    assert 0 <= row["map50_95"] <= row["map50"] <= 1 and row["images"] == 2 and len(row["image_set"]) == 64
    assert row["latency_n"] == 80 and row["latency_p90_ms"] > 0 and row["latency_p99_ms"] is None
    assert row["end_to_end_p50_ms"] > 0 and row["fps"] > 0 and row["memory_mib"] > 10
    assert row["power_w"] is row["idle_w"] is row["energy_mj_per_frame"] is document["power_from"] is None
    missing = {one["runtime"]: one for one in document["rows"][1:]}
    assert set(missing) == {"coreml", "litert", "ncnn", "openvino", "tensorrt"} and all(
        one["status"] == "missing" and one["reason"] for one in missing.values()
    )
    assert "onnxruntime-fp32" in capsys.readouterr().out
    assert run("detect", bundle) == 0, "device.json is no stranger"


class Watts:
    source = "drawn"

    def __enter__(self) -> Watts:
        return self

    def __exit__(self, *_: object) -> None: ...

    def mean(self) -> float:
        return 8.0


def test_energy_is_watts_over_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "throughput", lambda folder, images, duration_s, meter: 40.0)
    meter: Any = Watts()
    found = bench._power(Path("a"), bench.Plan(), meter, [])
    assert found == {"power_w": 8.0, "energy_mj_per_frame": pytest.approx(200.0)}


def test_watts_are_of_the_load_and_not_of_the_engines_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = [False]

    class Rails(jetson.Meter):
        def __init__(self) -> None:
            super().__init__(interval_s=0.01)
            self.source, self._rails = "drawn", [None]  # type: ignore[list-item]

        def _rail_loop(self) -> None:
            while not self._over.wait(self._interval_s):
                self._add_sample(20.0 if busy[0] else 5.0)

    @contextmanager
    def slow(folder: Path) -> Iterator[Callable[[Any], Any]]:
        def pipeline(source: Any) -> Any:
            busy[0] = True
            for picture in source:
                time.sleep(0.002)
                yield picture

        time.sleep(0.2)
        yield pipeline
        busy[0] = False
        time.sleep(0.1)

    monkeypatch.setattr(bench, "open_pipeline", slow)
    picture = np.zeros((4, 4, 3), np.uint8)
    found = bench._power(Path("a"), bench.Plan(power_s=0.2), Rails(), [picture])
    assert found["power_w"] == 20.0


def test_what_would_be_written_into_the_bundle_is_refused(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = [str(bundle / "golden" / "0.npy")]
    for main, words in (
        (detect.main, [*here, "--shadow", str(bundle / "log")]),
        (detect.main, [*here, "--draw", str(bundle / "golden")]),
        (bench.main, ["--out", str(bundle / "mine.json")]),
        (build.main, ["--out", str(bundle)]),
    ):
        assert main(words, bundle) == 5 and "lies in the bundle" in capsys.readouterr().err
    assert detect.main([*here, "--shadow", str(bundle.parent / "log")], bundle) == 0
    (bundle / "device.json.partial").write_text("")
    assert run("detect", bundle) == 0, "a bench.py that was killed is no objection"


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (detect.main, ["0.npy", "--engines", "-1"]),
        (detect.main, ["0.npy", "--limit", "0"]),
        (bench.main, ["--power-s", "0"]),
        (bench.main, ["--power-s", "nan"]),
        (bench.main, ["--iterations", "-5"]),
        (bench.main, ["--threads", "0"]),
        (build.main, ["--workspace-mib", "0"]),
    ],
)
def test_numbers_that_mean_nothing_are_a_usage_error(
    main: Callable[..., int], words: list[str], bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words, bundle)
    assert ended.value.code == 2 and "invalid" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"imgsz": ["a", "b"]},
        {"imgsz": [0, 64]},
        {"names": 5},
        {"names": ["\ud800"]},
        {"name": 1},
        {"max_det": "many"},
        {"gate": None},
        {"val": None},
    ],
)
def test_a_manifest_of_other_types_is_refused(
    change: dict[str, Any], bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    about = {key: value for key, value in manifest.items() if key not in ("files", "schema", "version")}
    seal(bundle, {**about, **change}, 4, None)
    for command in COMMANDS:
        assert run(command, bundle) == 5 and "make " in capsys.readouterr().err


def test_a_latency_table_is_of_floats(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(layer_times, "take", lambda *arguments: list(map(str, arguments)))
    assert bench.main(["--latency-table", "probe", "--engine", "openvino-fp16", "--threads", "2"], bundle) == 0
    assert json.loads(capsys.readouterr().out) == ["probe", "openvino", "fp16", "2"]
    with pytest.raises(SystemExit) as ended:
        bench.main(["--latency-table", "probe", "--engine", "openvino-int8"], bundle)
    assert ended.value.code == 2 and "times models in float" in capsys.readouterr().err


def test_a_failed_self_test_is_exit_code_1(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = bundle / golden.FOLDER / golden.FILE
    document = json.loads(file.read_text())
    document["expected"]["onnxruntime-fp32"][0][0][0] += 1.0
    file.write_text(json.dumps(document))
    about = {
        k: v
        for k, v in json.loads((bundle / "manifest.json").read_text()).items()
        if k not in ("files", "schema", "version")
    }
    seal(bundle, about, 4, None)
    assert run("bench", bundle) == 1 and "golden images FAILED: one box off by 1" in capsys.readouterr().err


BARE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "ultralytics", "yolo_compress", "cv2", "openvino", "onnx", "scipy", "cryptography"}:
            raise ImportError(name + " is not on this robot")
sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def bare(bundle: Path, command: str, *words: str) -> subprocess.CompletedProcess[str]:
    """A command as on a robot: numpy, onnxruntime and pillow alone."""
    return subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(bundle)!r})\n{BARE}", str(bundle / command), *words],
        capture_output=True, text=True, timeout=120, check=False, cwd=bundle.parent,
    )  # fmt: skip


@pytest.mark.fault(62)
@pytest.mark.slow
def test_the_launchers_need_numpy_and_an_engine_library_alone(bundle: Path) -> None:
    shutil.rmtree(bundle / "engines")
    done = bare(bundle, "build.py", "--runtime", "onnxruntime")
    assert done.returncode == 0, done.stderr
    done = bare(bundle, "detect.py", str(bundle / "golden/0.npy"), "--conf", str(CONF))
    assert done.returncode == 0 and json.loads(done.stdout)["detections"], done.stderr
    done = bare(bundle, "bench.py", "--golden")
    assert done.returncode == 0, done.stderr
    assert bare(bundle, "switch.py", "--help").returncode == 0
    assert not list(bundle.rglob("__pycache__")), "which would be refused"
