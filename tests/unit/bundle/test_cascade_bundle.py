"""A cascade in a bundle: the robot builds both engines, and detects what the workstation does; another policy or file is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.support.cascade_bundle import GOLDEN_IMAGES, KEPT, Workstation, artefact, make_cascade_bundle, workstation
from tests.support.shade_engines import LARGE_PX, SMALL_PX, write_engine
from tests.support.typed import validate
from yolo_compress.bundle import cascade_files, make
from yolo_compress.cli.main import main
from yolo_compress.errors import CompressError, CorruptArtifact, DataError, GateFailed, RecipeError
from yolo_compress.evaluate.cascade.write import DOCUMENT
from yolo_compress.evaluate.golden_images import _of_both_models, write_found
from yolo_compress.runtime import registry
from yolo_compress.runtime.backends.base import POLICY, load_info, save_info
from yolo_compress.runtime.commands import bench, build, detect, device_json
from yolo_compress.runtime.commands import bundle as bundle_module
from yolo_compress.runtime.detect.detector import Detector
from yolo_compress.runtime.engine import build_cascade, open_engine, takes
from yolo_compress.runtime.errors import EngineError
from yolo_compress.runtime.measure import golden
from yolo_compress.runtime.secure import ed25519
from yolo_compress.runtime.secure.signed_manifest import BundleRefused, Manifest, seal, verify
from yolo_compress.store.store import Store

NAME = "onnxruntime-cascade"
BUILD = ["--runtime", "onnxruntime"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Workstation:
    return workstation(tmp_path_factory.mktemp("workstation"))


@pytest.fixture(scope="module")
def built(made: Workstation) -> Path:
    """A bundle whose engines are built."""
    root = make_cascade_bundle(made, made.folder / "bundle")
    assert build.main(BUILD, root) == 0
    return root


@pytest.fixture
def bundle(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("YOLO_COMPRESS_KEY", raising=False)
    return Path(shutil.copytree(built, tmp_path / "bundle"))


def sealed(bundle: Path, seed: bytes | None = None, **changes: Any) -> None:
    """Seal the bundle again after a change of its files or its manifest."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    about = {key: value for key, value in manifest.items() if key not in ("files", "schema", "version")}
    seal(bundle, {**about, **changes}, 4, seed)


def lines(capsys: pytest.CaptureFixture[str]) -> list[Any]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_robot_detects_what_the_workstation_does(
    bundle: Path, made: Workstation, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(["--golden"], bundle) == 0
    (answer,) = lines(capsys)
    assert set(answer["golden"]) == {"onnxruntime-fp32", NAME}
    test = answer["golden"][NAME]
    assert test["passed"] and test["worst_box_px"] <= 0.5 and test["tolerance"]["box_px"] == 0.5, "the same library"
    images = made.data.val[0].image.parent
    assert detect.main([str(images), "--engines", "1"], bundle) == 0
    found = {Path(line["picture"]).name: line["detections"] for line in lines(capsys)}
    assert detect.main([str(images), "--engines", "1", "--engine", NAME], bundle) == 0
    assert {Path(line["picture"]).name: line["detections"] for line in lines(capsys)} == found, "it is the default"
    assert main(["predict", f"source={images}", f"engine={made.policy}", "engines=1"]) == 0
    there = {Path(line["picture"]).name: line["detections"] for line in lines(capsys)[:-1]}
    assert found == there and len(found) == len(made.data.val)


def test_the_bundle_has_each_model_once_and_golden_images_of_both_kinds(bundle: Path, made: Workstation) -> None:
    manifest = verify(bundle)
    validate(manifest, Manifest)
    about = manifest["cascade"]
    assert (about["small"], about["large"]) == ("cascade/small/fp32.onnx", "onnx/fp32.onnx")
    assert about["kept"] == KEPT and about["verdict"] == "pass"
    assert sum(name.endswith(".onnx") for name in manifest["files"]) == 2
    document, images = golden.load(bundle / "cascade")
    validate(document, golden.Golden)
    with open_engine(made.policy) as engine:
        detector = Detector(engine)
        dark = [image.mean() < 100 for image in images]
        assert document["handed"] == dark == [detector.margin(image) > 0 for image in images]
    assert sum(dark) == GOLDEN_IMAGES // 2 and len(dark) == GOLDEN_IMAGES


def test_a_bundle_without_a_cascade_has_no_trace_of_one(made: Workstation) -> None:
    assert make.order({"out": "/nowhere/a"}).cascade is None
    assert "cascade" not in make.README


def test_a_second_build_changes_nothing(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sidecar = bundle / f"engines/{NAME}/small/engine.json"
    before = sidecar.stat().st_mtime_ns
    assert build.main(BUILD, bundle) == 0
    out, err = capsys.readouterr()
    assert f"{NAME}: up to date" in err and sidecar.stat().st_mtime_ns == before
    rows = {row["engine"]: row for row in json.loads(out)["engines"]}
    assert rows[NAME]["seconds"] is None and rows[NAME]["onnx"] == "cascade/small/fp32.onnx then onnx/fp32.onnx"
    sidecar.unlink()
    assert build.main(BUILD, bundle) == 0 and sidecar.is_file()
    assert bench.main(["--golden", "--engine", NAME], bundle) == 0


def test_other_precisions_leave_the_cascade_out_and_no_runtime_for_it_is_an_error(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = bundle_module.open_bundle(bundle)
    assert build._for_cascade(opened, ["onnxruntime"], ["int8"]) == []
    assert "cascade: not built, because its models are fp32 and fp32" in capsys.readouterr().err
    assert opened.cascade is not None
    files = ("cascade/small/int8-openvino.onnx", "onnx/int8-openvino.onnx")
    policy = opened.cascade.policy
    int8 = policy._replace(small=policy.small._replace(precision="int8"), large=policy.large._replace(precision="int8"))
    other = replace(opened, cascade=opened.cascade._replace(onnx=files, policy=int8))
    assert build._for_cascade(other, ["onnxruntime", "openvino"], ["int8"]) == ["openvino"]
    assert build._for_cascade(other, ["openvino"], None) == ["openvino"], "though the recipe's model is in FP32 only"
    with pytest.raises(EngineError, match=r"int8-openvino.onnx is not for onnxruntime; fit `yolo-compress cascade`"):
        build._for_cascade(other, ["onnxruntime"], ["int8"])


def policy_of(bundle: Path, **changes: Any) -> None:
    """Alter the policy of the bundle, and of its built cascade, so that both still agree."""
    for folder in ("cascade", f"engines/{NAME}"):
        file = bundle / folder / POLICY
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(("threshold", "wrong"), [(-2.0, 2), (2.0, 2)])
def test_the_self_test_sees_a_router_that_chooses_otherwise(
    bundle: Path, threshold: float, wrong: int, capsys: pytest.CaptureFixture[str]
) -> None:
    policy_of(bundle, threshold=threshold)
    sealed(bundle)
    assert bench.main(["--golden", "--engine", NAME], bundle) == 1
    assert f"the router chooses the other model in {wrong} of 4 images" in capsys.readouterr().err


@pytest.mark.parametrize("handed", [None, [True], 3])
def test_a_self_test_without_the_routers_choices_is_malformed(
    bundle: Path, handed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = bundle / "cascade/golden/golden.json"
    document = {**json.loads(file.read_text()), "handed": handed}
    file.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))
    sealed(bundle)
    assert bench.main(["--golden", "--engine", NAME], bundle) == 5
    assert "golden.json: malformed" in capsys.readouterr().err


def test_the_self_test_sees_a_model_that_detects_otherwise(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The large engine is replaced by one that displaces the boxes, under the identity of the right one."""
    folder = bundle / f"engines/{NAME}/large"
    info = load_info(folder)
    other = write_engine(tmp_path / "other", LARGE_PX, blind=True)
    shutil.copyfile(other / "engine.onnx", folder / "engine.onnx")
    save_info(info, folder, ["engine.onnx"])
    assert bench.main(["--golden", "--engine", NAME], bundle) == 1
    assert "boxes that only one of the two finds" in capsys.readouterr().err


@pytest.mark.parametrize("harm", ["policy", "engine", "stale"])
def test_what_is_not_the_cascade_of_the_bundle_is_refused(
    harm: str, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built = bundle / f"engines/{NAME}"
    if harm == "policy":  # an altered copy in engines/, which no signature covers
        (built / POLICY).write_text(json.dumps({**json.loads((built / POLICY).read_text()), "threshold": 9.0}))
        says = "not the cascade of this bundle"
    elif harm == "engine":
        shutil.rmtree(built / "small")
        shutil.copytree(write_engine(tmp_path / "mute", SMALL_PX, blind=True, useful=False), built / "small")
        says = "but the policy was fitted to"
    else:  # the next bundle in the same folder has none
        shutil.rmtree(bundle / "cascade")
        (bundle / "onnx/small.onnx").write_bytes(b"")
        manifest = json.loads((bundle / "manifest.json").read_text())
        about = {k: v for k, v in manifest.items() if k not in ("files", "schema", "version", "cascade")}
        seal(bundle, about, 5, None)
        says = "not the cascade of this bundle"
    for command in (lambda: detect.main(["0.npy"], bundle), lambda: bench.main(["--golden"], bundle)):
        assert command() == 5
        out, err = capsys.readouterr()
        assert says in err and out == "" and err.count("\n") == 1


def test_with_a_pinned_key_only_what_was_built_here_runs(
    bundle: Path, made: Workstation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bundle.pub").write_text(ed25519.public_key(bytes(32)).hex())
    monkeypatch.setenv("YOLO_COMPRESS_KEY", str(tmp_path / "bundle.pub"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    sealed(bundle, bytes(32))
    image = str(bundle / "cascade/golden/0.npy")
    assert detect.main([image], bundle) == 5
    assert "not built on this machine by this user" in capsys.readouterr().err
    assert detect.main([image, "--engine", str(made.policy)], bundle) == 5, "the workstation's engines"
    assert build.main(BUILD, bundle) == 0
    assert detect.main([image], bundle) == 0 == bench.main(["--golden"], bundle)


@pytest.mark.parametrize(
    "change",
    [
        {"kept": 2.0},
        {"kept": "0.5"},
        {"small": "onnx/gone.onnx"},
        {"small": "onnx/fp32.onnx"},
        {"large": None},
        {"small": "onnx/fp32.onnx", "large": "cascade/small/fp32.onnx"},
    ],
)
def test_a_manifest_that_does_not_describe_the_cascade_is_refused(bundle: Path, change: dict[str, Any]) -> None:
    about = json.loads((bundle / "manifest.json").read_text())["cascade"]
    sealed(bundle, cascade={**about, **change})
    with pytest.raises(BundleRefused, match=r"does not describe a cascade|not of the models in"):
        bundle_module.open_bundle(bundle)


def test_engines_are_only_built_from_the_files_of_the_policy(made: Workstation, tmp_path: Path) -> None:
    files = [made.folder / "large/net.onnx", made.folder / "small/net.onnx"]
    with pytest.raises(
        EngineError, match=r"net.onnx: ONNX .*, but the policy was fitted to .*; run `yolo-compress cas"
    ):
        build_cascade(made.policy / POLICY, files, "onnxruntime", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_bench_measures_the_cascade_beside_its_models(
    bundle: Path, made: Workstation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of four images is dark, so the small model keeps 75 %."""
    for kind in ("images", "labels"):
        (tmp_path / "val" / kind).mkdir(parents=True)
    for index in (0, 1, 2, 4):
        image = made.data.val[index].image
        shutil.copyfile(image, tmp_path / "val/images" / image.name)
        label = image.parents[2] / "labels/val" / f"{image.stem}.txt"
        shutil.copyfile(label, tmp_path / "val/labels" / label.name)
    monkeypatch.setattr(bench, "THROUGHPUT_S", 0.3)
    words = ["--iterations", "80", "--engine", NAME, "--data", str(tmp_path / "val")]
    assert bench.main(words, bundle) == 0
    document = json.loads((bundle / "device.json").read_text())
    validate({**document, "rows": []}, device_json.Document)
    (row,) = document["cascades"]
    assert row["kept"] == 0.75 and row["kept_images"] == 4 and row["map50_95"] == pytest.approx(1.0)
    assert row["golden"]["passed"] and document["golden"]["passed"] and row["latency_n"] == 80
    assert row["mean_ms"] == pytest.approx(0.75 * row["kept_ms"] + 0.25 * row["handed_ms"])
    assert row["kept_ms"] < row["handed_ms"] and row["p99_ms"] is None, "not from 80 calls"
    assert row["small_ms"] < row["large_ms"] and row["fps"] > 0
    out = capsys.readouterr().out
    assert "so p99 is about the sum of both" in out and "75.0%" in out
    assert detect.main([str(bundle / "golden/0.npy")], bundle) == 0, "device.json is no stranger"


def test_throughput_is_of_images_in_their_shares() -> None:
    images = [np.full((1, 1, 3), level, np.uint8) for level in (200, 10, 201, 11)]
    mixed = bench._mixed(images, np.array([False, True, False, True]), 0.25)
    dark = [int(image.mean()) < 100 for image in mixed]
    assert len(dark) == 100 and sum(dark) == 25 and sum(dark[:20]) == 5, "evenly spread"
    assert sum(int(image.mean()) < 100 for image in bench._mixed(images, np.array([False, True] * 2), 0.0)) == 0


def test_a_cascade_is_the_default_unless_its_self_test_failed_here(bundle: Path) -> None:
    opened = bundle_module.open_bundle(bundle)
    engines = ["onnxruntime-fp32", NAME, "openvino-cascade"]

    def order(*cascades: tuple[str, float, bool]) -> list[str]:
        rows = [{"runtime": runtime, "mean_ms": ms, "golden": {"passed": passed}} for runtime, ms, passed in cascades]
        row = {
            "runtime": "onnxruntime",
            "precision": "fp32",
            "status": "ok",
            "latency_p50_ms": 1.0,
            "golden": {"passed": True},
        }
        document = {"bundle": opened.about(), "rows": [row], "cascades": rows}
        (bundle / "device.json").write_text(json.dumps(document))
        return bundle_module.fastest_first(opened, engines)

    assert order() == ["openvino-cascade", NAME, "onnxruntime-fp32"], "by preference"
    assert order(("onnxruntime", 3.0, True), ("openvino", 4.0, True))[0] == NAME
    assert order(("onnxruntime", 3.0, False), ("openvino", 4.0, True)) == ["openvino-cascade", "onnxruntime-fp32", NAME]
    (bundle / "device.json").write_text((bundle / "device.json").read_text().replace('"ok"', '"missing"'))
    engines.append("tensorrt-fp16")  # not measured, and on a GPU
    assert bundle_module.fastest_first(opened, engines)[-1] == NAME, "its self-test failed"


@pytest.mark.parametrize(
    ("stem", "runtimes"),
    [
        ("fp32", {"litert", "coreml", "ncnn", "onnxruntime", "openvino"}),
        ("int8", {"ncnn"}),  # OpenVINO runs it, too, but with wrong boxes on some processors
        ("int8-openvino", {"openvino"}),
        ("int8-onnxruntime", {"onnxruntime", "litert"}),
        ("int8-tensorrt11", {"coreml"}),
    ],
)
def test_a_file_is_for_the_runtimes_that_are_built_from_it(stem: str, runtimes: set[str]) -> None:
    precision = stem.partition("-")[0]
    assert {one for one in registry.names(gpu=False) if takes(stem, one, precision)} == runtimes


def scored(score: float) -> np.ndarray:
    return np.array([[0, 0, 9, 9, score, 0]])


def test_golden_images_are_clear_cases_of_both_models() -> None:
    margins = np.array([0.1, 0.9, 0.0, -0.2, 0.5, -0.6, -0.9])
    found = [scored(0.9)] * 6 + [scored(0.01)]
    assert _of_both_models(found, 0.25, 4, margins) == [1, 3, 4, 5], "an image without a box comes last"
    assert _of_both_models(found, 0.25, 3, margins) == [1, 3, 5] and _of_both_models(found, 0.25, 1, margins) == [1, 5]
    for sign, model in ((1, "small"), (-1, "large")):
        with pytest.raises(DataError, match=f"detections of the cascade's {model} model on all engines"):
            _of_both_models(found, 0.25, 4, sign * np.abs(margins))


def test_images_in_which_engines_choose_other_models_do_not_widen_the_tolerance(tmp_path: Path) -> None:
    """In the second image, one engine gives the large model's detections and the other those of the small one."""
    other = np.array([[20, 20, 60, 60, 0.5, 0]])
    found = {"onnxruntime-fp32": [scored(0.9)] * 3, "openvino-fp32": [scored(0.9), other, scored(0.9)]}
    about: Any = {}
    images = [np.zeros((8, 8, 3), np.uint8)] * 3
    said = write_found(tmp_path / "golden", list("abc"), images, found, about, 2, np.array([0.5, 0.0, -0.5]))
    assert said["images"] == 2 and said["tolerances"]["fp32"] == {**said["tolerances"]["same"]}  # type: ignore[dict-item]
    document = golden.load(tmp_path)[0]
    assert [image["name"] for image in document["images"]] == ["a", "c"] and document["images_measured"] == 2
    assert document["handed"] == [True, False]


# --- what `yolo-compress bundle cascade=` refuses ----------------------------------------------------------------------


def altered_document(made: Workstation, folder: Path, **changes: Any) -> Path:
    """A copy of the policy folder with another cascade.json."""
    shutil.copytree(made.policy, folder)
    file = folder / DOCUMENT
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


def test_a_cascade_that_is_not_recommended_makes_no_bundle_unless_forced(
    made: Workstation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verdict = {**made.given().document["verdict"], "status": "inconclusive", "line": "INCONCLUSIVE: use small alone"}
    folder = altered_document(made, tmp_path / "policy", verdict=verdict)
    options = {"out": "/nowhere/a", "cascade": str(folder)}
    with pytest.raises(GateFailed, match=r"INCONCLUSIVE: use small alone; no bundle is made \(force=true"):
        make.order(options)
    asked = make.order({**options, "force": "true"})
    assert "forced: INCONCLUSIVE" in capsys.readouterr().err
    report: Any = type(
        "Report", (), {"metrics": {"gate": {"passed": True, "reason": None}, "verdict": {"line": "PASS"}}}
    )
    gate = make._gate(report, asked)
    assert gate == {"forced": True, "passed": False, "reason": "INCONCLUSIVE: use small alone"}, "switch.py refuses it"
    assert make._gate(report, make.order({"out": "/nowhere/a", "cascade": str(made.policy)}))["passed"] is True


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"cascade": "gone"}, "cascade=gone: no policy folder"),
        ({"target": "triton"}, "cascade: works with target=plain only; triton runs one model"),
    ],
)
def test_options_that_cannot_work_are_refused_first(made: Workstation, options: dict[str, str], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        make.order({"out": "/nowhere/a", "cascade": str(made.policy), **options})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"schema": 2}, "schema 2, expected 1"),
        ({"quiet": "yes"}, "quiet: Input should be a valid boolean"),
        ({"cascade": None}, "not of the policy in this folder"),
        ({"small": "large"}, "not of the policy in this folder"),
    ],
)
def test_a_damaged_document_is_refused(made: Workstation, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    if changes.get("small"):
        changes = {"small": made.given().document["large"]}
    folder = altered_document(made, tmp_path / "policy", **changes)
    with pytest.raises(CorruptArtifact, match=f"{says}.*; run `yolo-compress cascade` again"):
        cascade_files.given(folder)


def test_models_that_are_not_found_or_are_judged_on_other_images_are_refused(made: Workstation, tmp_path: Path) -> None:
    given, empty = made.given(), Store(tmp_path / "weights")
    other = artefact(empty, "export", "other", {"compressed/fp32.onnx": made.policy / POLICY})
    renamed = replace(given, policy=given.policy._replace(names=("a", "b")))
    cases: list[tuple[cascade_files.Given, Store, Any, Any, str]] = [
        (renamed, made.store, made.export, made.data, "its classes are"),
        (given, made.store, made.export, replace(made.data, val_digest="0" * 64), "the recipe's is 0000000000000000; run"),
        (given, made.store, other, made.data, "neither model is the compressed model of this recipe"),
        (given, empty, made.export, made.data, "no export in weights/store has the ONNX file of small"),
    ]  # fmt: skip
    for one, store, export, data, says in cases:
        with pytest.raises(RecipeError, match=says):
            cascade_files.find(one, store, export, data)


def test_a_model_with_another_output_is_refused(made: Workstation, tmp_path: Path) -> None:
    """Its file has NMS in the graph, or a batch, or another name of the output."""
    net = onnx.load(str(made.folder / "small/net.onnx"))
    net.graph.output[0].name = net.graph.node[-1].output[0] = "boxes"
    onnx.save(net, str(tmp_path / "fp32.onnx"))
    given = made.given()
    small, large = cascade_files.find(given, made.store, made.export, made.data)
    store = Store(tmp_path / "weights")
    wrong = cascade_files.Source(
        artefact(store, "export", "wrong", {"compressed/fp32.onnx": tmp_path / "fp32.onnx"}), small.name
    )
    (tmp_path / "root").mkdir()
    with pytest.raises(CompressError, match="expected images"):
        cascade_files.add(tmp_path / "root", given, (wrong, large), {}, made.data, made.built, 2)
