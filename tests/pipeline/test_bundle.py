"""A bundle of a finished chain: its commands run on numpy and ONNX Runtime alone, and detect what the workstation does."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.pipeline.conftest import Bench
from tests.support import report_case
from tests.support.typed import validate
from tests.unit.runtime.test_commands import BARE
from yolo_compress.data.dataset import Dataset, load
from yolo_compress.evaluate.cascade.write import fill, policy_json, publish
from yolo_compress.evaluate.coco import mean_ap
from yolo_compress.runtime.backends.base import load_info
from yolo_compress.runtime.detect.cascade import FEATURES
from yolo_compress.runtime.detect.detector import Detector
from yolo_compress.runtime.detect.pre import read_image
from yolo_compress.runtime.engine import open_engine
from yolo_compress.runtime.measure.golden import Golden, beyond, detections, difference
from yolo_compress.runtime.secure.signed_manifest import Manifest, verify
from yolo_compress.store.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROWS = ("onnxruntime-fp32", "onnxruntime-int8")


@pytest.fixture(scope="module")
def bundle(chain: Bench) -> Path:
    """Signed, of a chain that is finished already."""
    chain.run("keygen", "out=robot.key")
    made = chain.run("bundle", "recipe=tiny.yaml", "out=bundle", "key=robot.key", "version=5")
    summary = json.loads(made.stdout.splitlines()[-1])
    assert summary["signed"] and summary["version"] == 5 and "baseline: up to date" in made.stderr
    return chain.folder / "bundle"


def images_of(chain: Bench) -> Dataset:
    """As its recipe names them, relative to its folder."""
    given = yaml.safe_load((chain.folder / "tiny.yaml").read_text())["data"]
    with contextlib.chdir(chain.folder):
        return load(given["yaml"], limit_train=given["limit_train"], limit_val=given["limit_val"])


def robot(python: str | Path, bundle: Path, command: str, *words: str) -> str:
    done = subprocess.run(
        [python, "-I", "-c", f"import sys; sys.path.insert(0, {str(bundle)!r})\n{BARE}", str(bundle / command), *words],
        capture_output=True, text=True, timeout=250, check=False, cwd=bundle.parent,
        env={**os.environ, "YOLO_COMPRESS_KEY": str(bundle.parent / "robot.key.pub")},
    )  # fmt: skip
    assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def compare(python: str | Path, chain: Bench, bundle: Path, tmp_path: Path) -> None:
    """Build, self-test, and the same boxes in every image of the chain."""
    robot(python, bundle, "build.py", "--runtime", "onnxruntime")
    assert all(
        test["passed"]
        for test in json.loads(robot(python, bundle, "bench.py", "--golden").splitlines()[-1])["golden"].values()
    )
    golden = json.loads((bundle / "golden/golden.json").read_text())
    validate(golden, Golden)
    data = images_of(chain)
    images = [sample.image for sample in (*data.train, *data.val)]
    (tmp_path / "images").mkdir()
    for number, image in enumerate(images):
        shutil.copyfile(image, tmp_path / "images" / f"{number:02d}{image.suffix}")
    for row in ROWS:
        shadow = tmp_path / f"{row}.jsonl"
        words = (
            str(tmp_path / "images"),
            "--engine",
            row,
            "--conf",
            str(golden["floor"]),
            "--shadow",
            str(shadow),
            "--quiet",
        )
        robot(python, bundle, "detect.py", *words)
        frames = [json.loads(text) for text in shadow.read_text().splitlines()]
        found = [np.array(frame["detections"], np.float64).reshape(-1, 6) for frame in frames]
        with open_engine(chain.folder / "weights/tiny/engine/compressed" / row) as engine:
            expected = detections(engine, [read_image(image) for image in images], golden["floor"], golden["iou"])
        apart = difference(expected, found, golden["conf"])
        assert (
            len(found) == len(images)
            and apart.worst_box_px <= 0.5
            and apart.worst_score <= 1e-3
            and apart.unmatched == 0
        ), apart
        assert apart.compared > 0 or not golden["boxes"]


def test_as_on_a_robot(chain: Bench, bundle: Path, tmp_path: Path) -> None:
    compare(sys.executable, chain, bundle, tmp_path)
    manifest = verify(bundle)
    validate(manifest, Manifest)
    assert set(manifest["onnx"]) == {
        "fp32", "fp16", "int8", "int8-tensorrt11", "int8-onnxruntime", "int8-openvino",
    }  # fmt: skip
    assert (
        manifest["golden"]["tolerances"]["same"]["box_px"] == 0.5 and manifest["made_with"]["packages"]["onnxruntime"]
    )


def test_map_is_the_workstations(chain: Bench, bundle: Path, tmp_path: Path) -> None:
    data = images_of(chain)
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    for sample in data.val:
        shutil.copyfile(sample.image, tmp_path / "images" / sample.image.name)
        boxes = "".join(" ".join(map(repr, box)) + "\n" for box in sample.boxes)
        (tmp_path / "labels" / f"{sample.image.stem}.txt").write_text(boxes)
    robot(sys.executable, bundle, "build.py", "--runtime", "onnxruntime", "--precision", "fp32")
    robot(sys.executable, bundle, "bench.py", "--engine", ROWS[0], "--data", str(tmp_path), "--iterations", "40")
    row = json.loads((bundle / "device.json").read_text())["rows"][0]
    with open_engine(chain.folder / "weights/tiny/engine/compressed" / ROWS[0]) as engine:
        detector = Detector(engine)
        expected = mean_ap(data.val, [detector(read_image(sample.image)) for sample in data.val], data.names)
    assert expected["map50_95"] > 0
    assert row["map50_95"] == pytest.approx(expected["map50_95"], abs=1e-4)
    assert row["map50"] == pytest.approx(expected["map50"], abs=1e-4)
    assert row["image_set"] == data.val_digest, "the same images and boxes, wherever they lie"


def policy_folder(chain: Bench, data: Dataset, out: Path) -> Path:
    """A cascade of the compressed model in INT8 and the baseline in FP32, whose router hands over the half with the lower scores."""
    engines = chain.folder / "weights/tiny/engine"
    small, large = engines / "compressed/onnxruntime-int8", engines / "original/onnxruntime-fp32"
    infos = load_info(small), load_info(large)
    weights = np.zeros(len(FEATURES))
    weights[FEATURES.index("doubt")], weights[FEATURES.index("mean_score")] = -0.1, -1.0
    filled = out.with_name("filled")
    fill(filled, policy_json(*infos, weights, 0.0, 0.0), (small, infos[0]), (large, infos[1]))
    with open_engine(filled) as engine:
        detector = Detector(engine)
        margins = sorted(detector.margin(read_image(sample.image)) for sample in data.val)
    shutil.rmtree(filled)
    middle = sum(margins[len(margins) // 2 - 1 :][:2]) / 2
    fill(filled, policy_json(*infos, weights, 0.0, middle), (small, infos[0]), (large, infos[1]))
    document = report_case.cascade(image_set=data.val_digest, names=list(data.names))
    for name, info in zip(("small", "large"), infos, strict=True):
        document[name] = {**document[name], "onnx_sha256": info.onnx_sha256}
    publish(filled, out, document)
    return out


def test_a_cascade_detects_on_the_robot_what_it_detects_here(chain: Bench, bundle: Path, tmp_path: Path) -> None:
    """Within the golden tolerances, for images of both kinds, with a small model in INT8 and a large one in FP32."""
    data = images_of(chain)
    policy = policy_folder(chain, data, tmp_path / "policy")
    bundle = bundle.with_name("cascade-bundle")
    chain.run("bundle", "recipe=tiny.yaml", f"out={bundle}", f"cascade={policy}", "key=robot.key", "version=6")
    manifest = verify(bundle)
    validate(manifest, Manifest)
    assert manifest["cascade"]["small"] == "onnx/int8-onnxruntime.onnx"
    assert manifest["cascade"]["large"] == "cascade/large/fp32.onnx"
    robot(sys.executable, bundle, "build.py", "--runtime", "onnxruntime")
    tests = json.loads(robot(sys.executable, bundle, "bench.py", "--golden").splitlines()[-1])["golden"]
    assert tests["onnxruntime-cascade"]["passed"] and len(tests) == 4, tests
    golden = json.loads((bundle / "cascade/golden/golden.json").read_text())
    validate(golden, Golden)
    assert sorted(golden["handed"]) == [False, False, True, True]
    assert {"onnxruntime-int8", "onnxruntime-fp32"} <= set(golden["expected"]), "and other runtimes of the same files"
    (tmp_path / "images").mkdir()
    images = [sample.image for sample in data.val]
    for number, image in enumerate(images):
        shutil.copyfile(image, tmp_path / "images" / f"{number:02d}{image.suffix}")
    shadow = tmp_path / "cascade.jsonl"
    words = (str(tmp_path / "images"), "--conf", str(golden["floor"]), "--shadow", str(shadow), "--quiet")
    robot(sys.executable, bundle, "detect.py", *words)
    found = [
        np.array(json.loads(text)["detections"], np.float64).reshape(-1, 6) for text in shadow.read_text().splitlines()
    ]
    with open_engine(policy) as engine:
        expected = detections(engine, [read_image(image) for image in images], golden["floor"], golden["iou"])
        handed = [Detector(engine).margin(read_image(image)) > 0 for image in images]
    assert 0 < sum(handed) < len(images) == len(found)
    assert beyond(difference(expected, found, golden["conf"]), golden["tolerances"]["same"]) is None


@pytest.mark.network
def test_in_a_fresh_environment(chain: Bench, bundle: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    subprocess.run([python, "-m", "pip", "install", "-q", "numpy", "onnxruntime", "pillow"], check=True)
    compare(python, chain, bundle, tmp_path)


@pytest.mark.fault(77)
@pytest.mark.parametrize(
    ("knob", "target"), [("export.batch=4", "triton"), ("export.dynamic_batch=true", "deepstream")]
)
def test_batches_go_from_the_chain_to_the_robot(finished: Bench, tmp_path: Path, knob: str, target: str) -> None:
    """Boxes are those of single images; 12 images of the robot are three inferences, 8 of the validation two."""
    bundle = tmp_path / "bundle"
    words = (
        finished.namesake(f"batches-{target}"),
        knob,
        "engine.runtimes=onnxruntime",
        "report.images=0",
        "report.ab_replicates=0",
    )
    finished.run("keygen", f"out={tmp_path / 'robot.key'}")
    finished.run("bundle", *words, f"out={bundle}", f"target={target}", f"key={tmp_path / 'robot.key'}")
    store = Store(finished.folder / "weights")
    rows, single = (
        {row["file"]: row for row in store.linked(name, "bench").metrics["rows"] if row["status"] != "missing"}
        for name in (f"batches-{target}", "tiny")
    )
    assert rows["compressed/fp32.onnx"]["map50_95"] == pytest.approx(
        single["compressed/fp32.onnx"]["map50_95"], abs=1e-4
    )
    assert {row["status"] for row in rows.values()} == {"ok", "untimed"}
    robot(sys.executable, bundle, "build.py", "--runtime", "onnxruntime", "--precision", "int8")
    measured = json.loads(
        robot(sys.executable, bundle, "bench.py", "--iterations", "4", "--power-s", "0.1").splitlines()[-1]
    )
    assert measured["golden"]["passed"]
    (tmp_path / "images").mkdir()
    for number, sample in enumerate(images_of(finished).val[:5]):
        shutil.copyfile(sample.image, tmp_path / "images" / f"{number}{sample.image.suffix}")
    lines = robot(sys.executable, bundle, "detect.py", str(tmp_path / "images")).splitlines()
    assert len(lines) >= 5
