"""What a later stage would refuse, by recipe, data and model alone, is refused before any stage trains."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.support.noise_set import noise_set
from yolo_compress import pipeline, preflight
from yolo_compress.data.dataset import calibration_subset, load
from yolo_compress.errors import CompressError, CorruptArtifact, DataError, EnvironmentLacks, RecipeError
from yolo_compress.prune.cost import conv_shapes
from yolo_compress.quant import fakequant
from yolo_compress.recipe import recipe
from yolo_compress.runtime.measure.layer_times import SCHEMA
from yolo_compress.stages import _calibration_images, _load_or_train, _prune_plan
from yolo_compress.store.store import Store
from yolo_compress.train import checkpoint

TRAIN = 4
USUAL: dict[str, Any] = {
    "data": {"yaml": "set.yaml", "imgsz": 64},
    "baseline": {"model": "yolov8n.yaml", "epochs": 1},
    "prune": {"calib_images": 2, "epochs": 0},
    "qat": {"calib_images": 2, "epochs": 0},
    "export": {"calib_images": 2},
}


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a data set."""
    monkeypatch.chdir(tmp_path)
    noise_set(tmp_path, train=TRAIN, val=2)
    return tmp_path


def chosen(**sections: Any) -> recipe.Recipe:
    Path("r.yaml").write_text(json.dumps({name: row for name, row in (USUAL | sections).items() if row is not None}))
    return recipe.load(Path("r.yaml"))


def refused(kind: type[CompressError], target: str = "export", **sections: Any) -> str:
    """The message of a run, which started no stage."""
    with pytest.raises(kind) as caught:
        pipeline.run(chosen(**sections), target, store=Store(Path("weights")))
    assert not list(Path("weights").glob("[!.]*/*")), "a stage began"
    return str(caught.value)


def paint(count: int) -> None:
    """Make the first `count` calibration images one colour, of the seed 0."""
    for sample in calibration_subset(load("set.yaml").train, TRAIN, 0)[:count]:
        Image.new("RGB", (64, 48), (114,) * 3).save(sample.image)


@pytest.mark.fault(17, 79)
@pytest.mark.parametrize("section", ["prune", "qat", "export"])
def test_one_colour_is_refused_before_training(shop: Path, section: str) -> None:
    paint(TRAIN)
    others = dict.fromkeys({"prune", "qat", "export"} - {section})
    said = refused(DataError, section, **others)
    assert said.startswith("calibration: all 2 images are of one colour, such as ")
    assert said.endswith(f"; give images with objects in the training split, or a higher {section}.calib_images")


def test_the_images_that_calibrate_decide_not_the_others(shop: Path) -> None:
    """The preflight judges as the stage does, whichever images the seed chooses."""
    samples = load("set.yaml").train
    Image.new("RGB", (64, 48), (7,) * 3).save(samples[0].image)
    dataset = load("set.yaml")
    verdicts = set()
    for seed in range(8):
        here = chosen(export={"calib_images": 1}, run={"seed": seed})
        images = calibration_subset(dataset.train, 1, seed)
        failed = []
        for judge in (
            lambda images=images: list(_calibration_images.letterboxed(images, (64, 64))),
            lambda here=here: _calibration_images.check_calibration(here, dataset, "export"),
        ):
            try:
                judge()
                failed.append(False)
            except DataError:
                failed.append(True)
        assert failed[0] == failed[1]
        verdicts.add(failed[0])
    assert verdicts == {False, True}


def test_images_without_objects_have_no_map(shop: Path) -> None:
    for sample in calibration_subset(load("set.yaml").train, 2, 0):
        (shop / f"labels/train/{sample.image.stem}.txt").write_text("")
    for section in ("prune", "qat"):
        here = chosen(**{section: {"calib_images": 2, "epochs": 0, "sensitivity": "map50_95"}})
        with pytest.raises(
            DataError, match=rf"{section}\.sensitivity=map50_95: all 2 calibration images are background"
        ):
            _calibration_images.check_calibration(here, load("set.yaml"), section)
        _calibration_images.check_calibration(
            chosen(**{section: {"calib_images": TRAIN, "epochs": 0, "sensitivity": "map50_95"}}),
            load("set.yaml"),
            section,
        )


@pytest.mark.fault(32, 79)
def test_a_budget_that_cannot_be_reached_names_the_smallest(shop: Path) -> None:
    said = refused(RecipeError, "prune", prune={"keep_flops": 0.01, "epochs": 0})
    assert said.startswith("prune: keep_flops=0.01 cannot be reached; the smallest is ")
    smallest = float(said.partition("the smallest is ")[2].split()[0])
    model = checkpoint.new_model("yolov8n.yaml", ["bolt", "nut"], 3, 0)
    for share, reached in ((smallest, True), (smallest - 0.001, False)):
        config = chosen(prune={"keep_flops": share, "epochs": 0}).prune
        assert config
        if reached:
            _prune_plan.check(config, model, (64, 64))
        else:
            with pytest.raises(RecipeError, match="cannot be reached"):
                _prune_plan.check(config, model, (64, 64))


def test_an_image_size_that_the_strides_do_not_divide(shop: Path) -> None:
    said = [
        refused(
            RecipeError,
            "baseline",
            data={"yaml": "set.yaml", "imgsz": size},
            baseline={"model": "yolov8n-p6.yaml", "epochs": 1},
        )
        for size in (96, 64, [128, 160])
    ]
    assert said == [
        f"data.imgsz={size}: the largest stride of the baseline is 64; set multiples of 64, one of them 128 or more"
        for size in ("96,96", "64,64", "128,160")
    ]
    sections = {"data": {"yaml": "set.yaml", "imgsz": [64, 128]}, "baseline": {"model": "yolov8n-p6.yaml", "epochs": 1}}
    _load_or_train.check(chosen(**sections), load("set.yaml"), "baseline")


def test_nms_in_the_graph_of_a_model_that_needs_none(shop: Path) -> None:
    end_to_end = {"model": "yolo26n.yaml", "epochs": 1}
    said = refused(RecipeError, "baseline", baseline=end_to_end, export={"nms": True})
    assert said == "export.nms: the boxes of this model need no NMS (YOLO26); set export.nms=false"
    for name, nms in (("yolo26n", False), ("yolo11n", True)):
        sections = {"baseline": {"model": f"{name}.yaml", "epochs": 1}, "export": {"nms": nms}}
        _load_or_train.check(chosen(**sections), load("set.yaml"), "baseline")


def test_a_criterion_of_ones_own_has_its_function(shop: Path) -> None:
    Path("mine.py").write_text("def score(evidence, group): ...\n")
    assert "mine.py has no function 'scores'" in refused(RecipeError, "prune", prune={"criterion": "mine.py:scores"})


def table(model: torch.nn.Module) -> dict[str, Any]:
    shapes = conv_shapes(model, (64, 64))
    layers = {name: [[shape.macs * r, shape.macs * r * 1e-6] for r in (1, 0.1)] for name, shape in shapes.items()}
    return {"schema": SCHEMA, "whole_ms": 10.0, "layers": layers, "rest": [[0, 0], [1e9, 0]], "imgsz": [64, 64],
            "runtime": "onnxruntime"}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "limit", "kind", "said"),
    [
        ({"imgsz": [64, 96]}, 5, RecipeError, "t.json was measured at [64, 96], the recipe has [64, 64]"),
        ({"schema": SCHEMA + 1}, 5, CorruptArtifact, "t.json is not a table of layer times"),
        ({"layers": {"model.9": [[1, 1]]}}, 5, RecipeError, "so it belongs to another model"),
        ({}, 10, RecipeError, "latency_ms=10 is already met"),
        ({}, 0.001, RecipeError, "latency_ms=0.001 cannot be reached"),
    ],
)
def test_a_table_of_layer_times_is_read_before_training(
    shop: Path, change: dict[str, Any], limit: float, kind: type[CompressError], said: str
) -> None:
    model = checkpoint.new_model("yolov8n.yaml", ["bolt", "nut"], 3, 0)
    Path("t.json").write_text(json.dumps(table(model) | change))
    assert said in refused(kind, "prune", prune={"latency_ms": limit, "latency_table": "t.json", "epochs": 0})


def test_a_runtime_that_times_layers_is_there(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from yolo_compress.runtime.engine import BACKENDS

    monkeypatch.setattr(BACKENDS["openvino"], "probe", lambda: "openvino is not installed")
    said = refused(EnvironmentLacks, "prune", prune={"latency_ms": 5, "latency_runtime": "openvino", "epochs": 0})
    assert said == "prune.latency_runtime=openvino: openvino is not installed"


def test_int8_needs_its_libraries(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "modelopt.torch.quantization.nn", None)
        assert "INT8 training needs ModelOpt" in refused(EnvironmentLacks, "qat", prune=None)
    fakequant.check_installed()
    monkeypatch.setattr("yolo_compress.export.torchscript.ENGINES", ())
    assert "INT8 TorchScript: torch" in refused(EnvironmentLacks, "export", prune=None, qat=None)


@pytest.mark.parametrize("text", [None, "{", "{}"])
def test_measurements_of_robots_are_read_before_training(shop: Path, text: str | None) -> None:
    """`report add=` of a file that is not there, or is none, does not train first."""
    file = Path("device.json")
    if text is not None:
        file.write_text(text)
    with pytest.raises(CompressError, match=r"device\.json") as caught:
        pipeline.report_over(chosen(), [file], Path("out"), store=Store(Path("weights")))
    assert caught.value.exit_code == (6 if text is None else 5)
    assert not list(Path("weights").glob("[!.]*/*"))


@pytest.mark.parametrize("found", [0, 1])
def test_a_gpu_that_does_not_exist_is_refused_before_any_stage(
    shop: Path, monkeypatch: pytest.MonkeyPatch, found: int
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: found)
    said = refused(EnvironmentLacks, run={"device": "1"})
    assert said.startswith("run.device=1: there is no GPU 1, torch sees ") and "give run.device=cpu" in said
    preflight.check_processes(chosen(run={"device": "1"}), ["export", "engine", "report"])  # these need no GPU
