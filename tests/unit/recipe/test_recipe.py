"""Recipes: shipped files, overrides, and errors that name place, key, value and the allowed values."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from yolo_compress.chain import plan
from yolo_compress.errors import RecipeError
from yolo_compress.recipe import recipe

SHIPPED = ["bccd", "bccd-fast", "custom", "digits", "digits-l-to-s", "neu_det", "yolov8s-coco"]
NEEDED = {"custom": ["data.yaml=d.yaml", "baseline.pretrained=yolov8n.pt"]}  # knobs that the user has to set
MINIMAL = "data: {yaml: d.yaml}\nbaseline: {weights: a.pt}\n"
TRAIN = (
    "epochs batch optimizer lr0 lrf momentum weight_decay warmup_epochs cosine "
    "mosaic close_mosaic scale translate fliplr flipud amp"
)
FROZEN = {
    "data": "yaml imgsz on_bad allow_overlap max_unlabelled max_det hold_back limit_train limit_val",
    "run": "device workers seed threads val_every",
    "teacher": f"{TRAIN} weights pretrained model detection_part freeze",
    "baseline": f"{TRAIN} weights pretrained model detection_part freeze",
    "sparsify": f"{TRAIN} penalty l1 lambda_scale gamma_lr_scale ramp_epochs",
    "prune": f"{TRAIN} kind then then_share sparsity criterion scope keep_flops keep_params latency_ms latency_runtime "
    "latency_precision latency_table sensitivity max_drop rounds round_to depth floor reconstruct calib_images teach_from_parent",
    "distill": f"{TRAIN} teacher images data_free data_free_steps temperature alpha logit_weight feature_weight box_weight iou_weight "
    "feature_loss layers ramp_epochs off_without_mosaic",
    "qat": f"{TRAIN} calib_images calibrator percentile weight_bits sensitivity max_drop sensitivity_price float_groups learned_scales "
    "teach_from_parent",
    "export": "precisions opset batch dynamic_batch simplify torchscript nms coreml calibration_cache "
    "calib_images calibrator percentile",
    "engine": "runtimes workspace_mib int8_images",
    "bench": "warmup iterations rounds threads",
    "control": "nets max_minutes",
    "report": "min_retention max_latency_ms max_size_mib ab_margin ab_replicates conf images",
    "search": "runtime cost latency_ms size_mib max_drop trials hours keep_flops criterion round_to prune_share logit_weight "
    "feature_weight box_weight precision int8_max_drop short workers storage",
}


def load(tmp_path: Path, text: str, *overrides: str) -> recipe.Recipe:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return recipe.load(path, pairs(*overrides))


def pairs(*overrides: str) -> list[tuple[str, str]]:
    return [(key, value) for key, _, value in (text.partition("=") for text in overrides)]


def refusal(*overrides: str, name: str = "digits") -> str:
    with pytest.raises(RecipeError) as caught:
        recipe.load(name, pairs(*overrides))
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_options_are_frozen() -> None:
    """Users depend on the names of knobs. Add or rename a knob here too, and in the CHANGELOG."""
    assert list(recipe.options()) == [f"{name}.{key}" for name, keys in FROZEN.items() for key in keys.split()]


def test_every_option_has_a_default_but_the_data_set() -> None:
    assert [name for name, field in recipe.options().items() if field.is_required()] == ["data.yaml"]


def test_shipped_names() -> None:
    assert recipe.names() == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_loads_and_dump_round_trips(name: str, tmp_path: Path) -> None:
    shipped = recipe.load(name, pairs(*NEEDED.get(name, [])))
    path = tmp_path / f"{name}.yaml"
    path.write_text(shipped.dump(), encoding="utf-8")
    assert recipe.load(path) == shipped and shipped.name == name
    assert all(getattr(shipped, stage) for stage in ("prune", "qat", "report"))
    assert (shipped.distill is None) == (name in ("bccd", "bccd-fast", "neu_det"))  # there the stage cost mAP


def test_defaults_are_valid_values(tmp_path: Path) -> None:
    """Pydantic does not check defaults; reading the dump of empty sections does."""
    sections = "".join(f"{name}: {{}}\n" for name in recipe.SECTIONS if name not in ("data", "baseline", "teacher"))
    empty = load(tmp_path, MINIMAL + sections)
    assert load(tmp_path, empty.dump()) == empty


def test_values_arrive_typed(tmp_path: Path) -> None:
    loaded = load(tmp_path, MINIMAL + "prune: {lr0: 1e-4, warmup_epochs: 2}\nrun: {device: 0}\n")
    assert loaded.prune is not None and loaded.prune.lr0 == 1e-4 and loaded.run.device == "0"
    assert loaded.prune.warmup_epochs == 2.0 and type(loaded.prune.warmup_epochs) is float
    assert loaded.qat is None and loaded.name == "mine"


@pytest.mark.parametrize("text", ["384,640", "[384, 640]", "384, 640", "(384,640)"])
def test_imgsz_height_and_width(text: str) -> None:
    if text.startswith("("):
        assert "expected one side or height,width" in refusal(f"data.imgsz={text}")
    else:
        data = recipe.load("digits", pairs(f"data.imgsz={text}")).data
        assert data.imgsz == (384, 640) and data.imgsz_hw == (384, 640)


def test_square_imgsz_has_one_form() -> None:
    data = recipe.load("digits", pairs("data.imgsz=[320, 320]")).data
    assert data.imgsz == 320 and data.imgsz_hw == (320, 320)


def test_overrides_create_drop_and_replace() -> None:
    loaded = recipe.load(
        "digits",
        pairs("teacher.weights=my net=1 é.pt", "sparsify=null", "prune.keep_flops=0.6", "prune.keep_flops=0.7"),
    )
    assert loaded.teacher is not None and loaded.teacher.weights == "my net=1 é.pt" and loaded.teacher.epochs == 100
    assert loaded.sparsify is None
    assert loaded.prune is not None and loaded.prune.keep_flops == 0.7 and loaded.prune.criterion == "bn_gamma"


def test_a_budget_on_the_command_line_overrides_the_files() -> None:
    assert recipe.load("bccd").prune.budget == ("keep_flops", 0.5)
    assert recipe.load("bccd", pairs("prune.latency_ms=8")).prune.budget == ("latency_ms", 8.0)
    assert recipe.load("bccd", pairs("prune.keep_params=0.4")).prune.budget == ("keep_params", 0.4)
    assert recipe.PruneConfig().budget == ("keep_flops", 0.5)


def test_a_kind_on_the_command_line_overrides_the_files(tmp_path: Path) -> None:
    """The recipe's budget is for channel pruning. Other kinds have no budget, so it is dropped."""
    loaded = recipe.load("bccd", pairs("prune.kind=unstructured", "prune.sparsity=0.7", "prune.scope=global"))
    assert loaded.prune is not None and (loaded.prune.kind, loaded.prune.sparsity) == ("unstructured", 0.7)
    assert loaded.prune.keep_flops is None and loaded.prune.epochs == 40
    zeros = MINIMAL + "prune: {kind: unstructured, sparsity: 0.7}\n"
    assert load(tmp_path, zeros, "prune.kind=channel", "prune.keep_flops=0.6").prune.keep_flops == 0.6
    with pytest.raises(
        RecipeError, match=r"prune\.keep_flops=0\.5 has no effect with prune\.kind=two_four: leave it out"
    ):
        load(tmp_path, MINIMAL + "prune: {kind: two_four, keep_flops: 0.5}\n")


@pytest.mark.fault(7)
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("prune.latency_ms=8", "prune.keep_flops=0.5"), "prune.keep_flops and prune.latency_ms are both given"),
        (
            ("prune.latency_ms=8", "prune.latency_table=t.json", "prune.latency_runtime=openvino"),
            "prune.latency_runtime has no effect with prune.latency_table",
        ),
        (
            ("engine.int8_images=true", "engine.runtimes=onnxruntime,openvino"),
            "engine.int8_images has no effect on onnxruntime, openvino: add litert to engine.runtimes",
        ),
        (
            ("engine.int8_images=true", "export.precisions=fp32"),
            "engine.int8_images has no effect without int8 in export.precisions",
        ),
        (("prune.latency_runtime=openvino",), "prune.latency_runtime has no effect without prune.latency_ms"),
        (("prune.sparsity=0.7",), "prune.sparsity=0.7 has no effect with prune.kind=channel"),
        (("prune.kind=two_four", "prune.sparsity=0.7"), "prune.sparsity=0.7 has no effect with prune.kind=two_four"),
        (("prune.kind=two_four", "prune.depth=true"), "prune.depth=true has no effect with prune.kind=two_four"),
        (("prune.kind=two_four", "prune.scope=global"), "prune.scope=global has no effect with prune.kind=two_four"),
        (("prune.kind=unstructured", "prune.latency_ms=8"), "prune.latency_ms=8.0 has no effect with prune.kind=unst"),
        (
            ("prune.kind=unstructured", "prune.criterion=l1"),
            "prune.criterion=l1 has no effect with prune.kind=unstruct",
        ),
        (("prune.kind=unstructured", "prune.scope=isomorphic"), "prune.kind=unstructured takes global or local"),
        (("prune.kind=two_four", "prune.rounds=2"), "prune.rounds=2 has no effect with prune.kind=two_four"),
        (("prune.kind=low_rank", "prune.criterion=l1"), "prune.criterion=l1 has no effect with prune.kind=low_rank"),
        (("prune.kind=low_rank", "prune.scope=global"), "prune.scope=global has no effect with prune.kind=low_rank"),
        (("prune.kind=low_rank", "prune.rounds=2"), "prune.rounds=2 has no effect with prune.kind=low_rank"),
        (("prune.kind=low_rank", "prune.depth=true"), "prune.depth=true has no effect with prune.kind=low_rank"),
        (("prune.kind=low_rank", "prune.sparsity=0.7"), "prune.sparsity=0.7 has no effect with prune.kind=low_rank"),
        (("prune.kind=low_rank", "prune.then=low_rank"), "prune.then=low_rank has no effect with prune.kind=low_rank"),
        (("prune.kind=low_rank", "prune.then_share=0.5"), "prune.then_share=0.5 has no effect with prune.kind=low"),
        (("prune.kind=two_four", "prune.then=low_rank"), "prune.then=low_rank has no effect with prune.kind=two_four"),
        (("prune.then_share=0.5",), "prune.then_share=0.5 has no effect with prune.then=off: leave it out"),
        (("prune.then=low_rank", "prune.rounds=2"), "prune.rounds=2 does not work with prune.then=low_rank"),
        (("prune.kind=low_rank", "prune.latency_table=t.json"), "prune.latency_table has no effect without prune.lat"),
        (("prune.rounds=5", "prune.epochs=4"), "prune.epochs=4 is less than prune.rounds=5"),
    ],
)
def test_contradictions_of_prune(overrides: tuple[str, ...], message: str) -> None:
    assert message in refusal(*overrides, name="bccd")


def test_sensitivity_price_takes_gflops_or_a_cpu_runtime() -> None:
    assert "expected one of gflops, ncnn, onnxruntime, openvino" in refusal(
        "qat.sensitivity=loss", "qat.sensitivity_price=tensorrt"
    )
    assert "qat.sensitivity_price has no effect with qat.sensitivity=off" in refusal("qat.sensitivity_price=openvino")
    assert "qat.max_drop has no effect with qat.sensitivity=off" in refusal("qat.max_drop=0.5")


def test_a_stage_that_measures_time_has_the_machine_in_its_key() -> None:
    """The results of the other stages are the same on every machine."""
    data: Any = SimpleNamespace(digest="d")

    def measured(stage: str, *overrides: str) -> bool:
        return "machine" in plan(recipe.load("digits", pairs(*overrides)), data, stage)[stage].key

    loss = "qat.sensitivity=loss"
    assert measured("qat", loss, "qat.sensitivity_price=onnxruntime")
    assert not measured("qat", loss) and not measured("qat") and measured("prune", "prune.latency_ms=1")
    assert not measured("prune", loss, "qat.sensitivity_price=onnxruntime")
    keys = [plan(recipe.load("digits", pairs(loss, f"qat.sensitivity_price={price}")), data, "qat")["qat"].fingerprint
            for price in ("gflops", "onnxruntime", "openvino")]  # fmt: skip
    assert len(set(keys)) == 3


def test_a_teacher_on_the_command_line_drops_the_files_knobs_that_it_does_not_use(tmp_path: Path) -> None:
    """The recipe's box weight and temperature compare detection heads; distill.teacher=self does not."""
    text = MINIMAL + "prune: {}\ndistill: {epochs: 12, box_weight: 3.0, temperature: 1.0}\n"
    loaded = load(tmp_path, text, "distill.teacher=self", "distill.layers=model.4=model.15,model.9=model.21")
    assert loaded.distill is not None and loaded.distill.box_weight == 1.0 and loaded.distill.epochs == 12
    assert loaded.distill.layers == ("model.4=model.15", "model.9=model.21")
    mutual = load(tmp_path, text, "distill.teacher=mutual").distill
    assert mutual is not None and mutual.box_weight == 3.0
    assert "expected null or a list of module names" in refusal("distill.layers=model.4=")
    assert "expected one of weighted_l2, fitnet, cwd" in refusal("distill.feature_loss=l3")


@pytest.mark.parametrize("word", ["0", "0,1", "cpu"])
def test_device_is_text(word: str) -> None:
    assert recipe.load("digits", pairs(f"run.device={word}")).run.device == word


def test_text_is_not_parsed() -> None:
    for word in ("true", "1e-4", "[a", "-x.pt", "a: b", "'q'", "null.pt", "~"):
        assert recipe.load("digits", pairs(f"baseline.weights={word}")).baseline.weights == word
    assert recipe.load("bccd", pairs("baseline.weights=null", "baseline.model=yolov8n.yaml")).baseline.weights is None


def test_lists_by_comma() -> None:
    loaded = recipe.load("digits", pairs("export.precisions=fp16, fp32", "engine.runtimes=openvino"))
    assert loaded.export is not None and loaded.export.precisions == ("fp16", "fp32")
    assert loaded.engine is not None and loaded.engine.runtimes == ("openvino",)


WRONG = {
    "epoch=10": "epoch: unknown key, did you mean epochs? Write it with its section: teacher.epochs, baseline.epochs",
    "qat.epoch=10": "qat.epoch: unknown key, did you mean epochs?",
    "qta.epochs=10": "qta.epochs: unknown key, did you mean qat.epochs?",
    "device=0": "device: unknown key, did you mean device? Write it with its section: run.device",
    "xyzzy.q=1": "xyzzy.q: unknown key; sections are data, run, teacher",
    "run.xyzzy=1": "run.xyzzy: unknown key; run takes device, workers, seed, threads",
    "qat.epochs.x=1": "qat.epochs.x: unknown key",
    "name=x": "name: unknown key",
    "data=my.yaml": "data is a section, did you mean data.yaml?",
    "qat=5": "qat is a section; the only value of a section is null",
    "qat=": "qat is a section",
    "baseline=null": "the section baseline cannot be left out",
    "run=null": "the section run cannot be left out",
    "qat.epochs=abc": "qat.epochs: got 'abc', expected auto or a whole number >= 0 and <= 100000",
    "qat.epochs=1.5": "qat.epochs: got 1.5, expected auto or a whole number",
    "qat.epochs=true": "qat.epochs: got true, expected auto or a whole number",
    "prune.keep_flops=abc": "prune.keep_flops: got 'abc', expected a number > 0 and < 1",
    "prune.keep_flops=1.5": "prune.keep_flops: got 1.5, expected a number > 0 and < 1",
    "prune.keep_flops=1": "prune.keep_flops: got 1, expected a number > 0 and < 1",
    "prune.keep_flops=0": "prune.keep_flops: got 0, expected a number > 0 and < 1",
    "prune.keep_flops=-0.1": "got -0.1, expected a number > 0 and < 1",
    "prune.keep_flops=nan": "got 'nan', expected a number > 0 and < 1",
    "prune.keep_flops=.nan": "got NaN, expected a number > 0 and < 1",
    "prune.keep_flops=inf": "got 'inf', expected a number",
    "prune.keep_flops=.inf": "got infinity, expected a number",
    "prune.keep_flops=1e999": "got infinity, expected a number",
    "prune.floor=": "got null, expected a number",
    "sparsify.l1=.nan": "got NaN, expected a number > 0 and <= 1",
    "prune.criterion=l3": "got 'l3', expected one of obs, bn_gamma, l1, l2",
    "prune.criterion=1": "got 1, expected one of obs, bn_gamma",
    "prune.criterion=mine.py": "or file.py:function",
    "prune.kind=2:4": "prune.kind: got '2:4', expected one of channel, low_rank, unstructured, two_four",
    "prune.sparsity=0": "prune.sparsity: got 0, expected a number > 0 and < 1",
    "prune.sparsity=1": "prune.sparsity: got 1, expected a number > 0 and < 1",
    "prune.round_to=12": "got 12, expected one of 1, 2, 4, 8",
    "qat.teach_from_parent=yes": "got 'yes', expected true or false",
    "data.limit_val=0": "data.limit_val: got 0, expected a whole number >= 1 or null",
    "data.yaml=": "data.yaml: got '', expected text",
    "data.yaml=null": "data.yaml: got null, expected text",
    "data.imgsz=100": "got 100, expected multiples of 32 from 32 to 4096; the nearest to 100 is 96",
    "data.imgsz=0": "the nearest to 0 is 32",
    "data.imgsz=1e6": "the nearest to 1000000.0 is 4096",
    "data.imgsz=640.0": "the nearest to 640.0 is 640",
    "data.imgsz=384,650": "the nearest to 650 is 640",
    "data.imgsz=.nan": "expected one side or height,width in pixels",
    "data.imgsz=32,32,32": "expected one side or height,width in pixels",
    "run.device=gpu": "got 'gpu', expected cpu or CUDA indices, as in 0 or 0,1",
    "run.device=0,0": "got '0,0', expected cpu or CUDA indices",
    "run.seed=" + "9" * 390: "expected a whole number >= 0 and <= 4294967295",
    "export.precisions=fp8": "got 'fp8', expected a list of fp32, fp16, int8",
    "export.precisions=fp32,fp32": "expected each item once",
    "export.precisions=[]": "got [], expected a list of fp32, fp16, int8",
    "export.precisions=[fp32": "export.precisions:1: expected ',' or ']'",
    "engine.runtimes=trt": "expected auto or a list of coreml, litert, ncnn, onnxruntime, openvino, tensorrt",
}


@pytest.mark.fault(2, 10)
@pytest.mark.parametrize("override", WRONG)
def test_wrong_overrides(override: str) -> None:
    message = refusal(override)
    assert message.startswith("command line: ") and WRONG[override] in message and "\n" not in message


FILES = {
    "unknown key": (
        "prune:\n  keep_flop: 0.5\n",
        "mine.yaml:4: prune.keep_flop: unknown key, did you mean keep_flops?",
    ),
    "unknown section": ("prun: {}\n", "mine.yaml:3: prun: unknown key, did you mean prune?"),
    "name": ("name: x\n", "mine.yaml:3: name: unknown key"),
    "number as section": ("5: {}\n", "mine.yaml:3: 5: unknown key"),
    "number as key": ("prune: {5: 1}\n", "mine.yaml:3: prune.5: unknown key"),
    "duplicate": ("baseline: {}\n", "mine.yaml:3: duplicate key baseline (first on line 2)"),
    "range": ("prune:\n  floor: 0.2\n  keep_flops: 1.5\n", "mine.yaml:5: prune.keep_flops: got 1.5, expected a number"),
    "list for section": ("prune: [1]\n", "mine.yaml:3: prune: got [1], expected a section (key: value)"),
    "blank section": ("distill:\n", "mine.yaml:3: distill: is empty; write distill: {} for its defaults, or"),
}


@pytest.mark.fault(1, 3)
@pytest.mark.parametrize("case", FILES)
def test_wrong_files(case: str, tmp_path: Path) -> None:
    text, message = FILES[case]
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, MINIMAL + text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_missing_sections_and_keys(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"mine.yaml: baseline is missing and has no default"):
        load(tmp_path, "data: {yaml: a}\n")
    with pytest.raises(RecipeError, match=r"mine.yaml:1: data.yaml is not given: add data.yaml=my.yaml"):
        load(tmp_path, "data: {imgsz: 32}\nbaseline: {}\n")
    with pytest.raises(RecipeError, match=r"mine.yaml:1: data: got null, expected a section"):
        load(tmp_path, "data: null\nbaseline: {}\n")


def test_every_wrong_key_gets_its_line() -> None:
    message = refusal("qat.epochs=-1", "prune.lr0=0", "qat.batch=0")
    assert message.splitlines() == [
        "command line: prune.lr0: got 0, expected a number > 0 and <= 1",
        "command line: qat.epochs: got -1, expected auto or a whole number >= 0 and <= 100000",
        "command line: qat.batch: got 0, expected auto or a whole number >= 1 and <= 4096",
    ]


CONTRADICTIONS = {
    ("export=null",): "engine needs the section export: add export: {}, or leave engine out too (engine=null)",
    ("engine=null",): "bench needs the section engine",
    ("bench=null",): "report needs the section bench",
    ("prune=null", "sparsify=null"): "distill: teacher and student are the same model",
    ("prune=null", "sparsify=null", "baseline.weights=b.pt", "teacher.weights=./weights/b.pt"): "are the same model",
    ("distill.logit_weight=0", "distill.feature_weight=0", "distill.box_weight=0"): (
        "distill.box_weight, distill.iou_weight: all 0, so nothing is distilled; set distill=null"
    ),
    ("distill.teacher=self", "distill.feature_weight=0"): "distill.feature_weight: all 0, so nothing is distilled",
    ("distill.teacher=self", "distill.iou_weight=1"): "distill.iou_weight=1.0 has no effect with distill.teacher=self",
    (
        "distill.teacher=self",
        "teacher.model=yolov8s.yaml",
    ): "the section teacher has no effect with distill.teacher=self",
    (
        "distill.teacher=mutual",
        "distill.images=folder",
    ): "distill.images=folder has no effect with distill.teacher=mutual",
    (
        "distill.feature_weight=0",
        "distill.feature_loss=cwd",
    ): "distill.feature_loss has no effect with distill.feature_weight=0",
    (
        "distill.feature_weight=0",
        "distill.layers=model.15",
    ): "distill.layers has no effect with distill.feature_weight=0",
    (
        "distill.feature_loss=relation",
        "distill.batch=1",
    ): "compares the images of a batch: distill.batch=1 is too small",
    ("distill.images=folder", "distill.data_free=8"): "distill.images and distill.data_free are both given",
    ("distill.images=folder", "distill.alpha=0.9"): "distill.alpha=0.9 has no effect without labels",
    ("distill.data_free_steps=8",): "distill.data_free_steps has no effect without distill.data_free",
    ("distill.off_without_mosaic=true", "distill.close_mosaic=0"): "set close_mosaic from 1 to 5",
    ("distill.off_without_mosaic=true", "distill.images=folder"): "and there are no labels: set it to false",
    ("export.dynamic_batch=true", "export.batch=4"): "export.batch=4 has no effect with export.dynamic_batch=true",
    ("bench.iterations=2",): "bench.iterations=2 is less than bench.rounds=3",
    ("qat.calibrator=max", "qat.percentile=99"): "qat.percentile=99.0 has no effect with qat.calibrator=max",
    ("export.calibrator=max", "export.percentile=99"): "export.percentile=99.0 has no effect",
    (
        "baseline.weights=a.pt",
        "baseline.epochs=3",
    ): "baseline.epochs has no effect: baseline.weights=a.pt is used without training",
    (
        "baseline.weights=a.pt",
        "baseline.pretrained=b.pt",
    ): "baseline.weights and baseline.pretrained exclude each other",
    ("baseline.model=null",): "baseline: nothing to start from; give baseline.pretrained (a checkpoint of any classes",
    ("teacher.epochs=5",): "teacher: nothing to start from; give teacher.pretrained",
    ("baseline.freeze=10",): "baseline.freeze has no effect without baseline.pretrained",
    ("search.trials=2", "prune=null"): "search varies how much prune removes: add a section prune, or set search=null",
    ("search.trials=2", "prune.kind=two_four"): "set prune.kind=channel, not two_four",
    (
        "search.trials=2",
        "prune.latency_ms=4",
    ): "search sets the budget of prune by search.keep_flops: set prune.latency_ms=null",
    ("search.size_mib=2",): "search.size_mib has no effect with search.cost=latency: set search.cost=size",
    ("search.latency_ms=2", "search.cost=size"): "search.latency_ms has no effect with search.cost=size",
    ("search.keep_flops=0.3,1.2",): "search.keep_flops=0.3,1.2: expected two numbers above 0 and below 1",
    ("search.logit_weight=0.5,2", "distill=null"): "search.logit_weight has no effect without the section distill",
    ("search.box_weight=0.5,2", "distill.teacher=self"): "search.box_weight has no effect with distill.teacher=self",
    ("search.int8_max_drop=0.01", "qat=null"): "search.int8_max_drop needs the section qat",
    ("baseline.detection_part=true",): "baseline.detection_part has no effect without baseline.pretrained",
}


@pytest.mark.fault(7)
@pytest.mark.parametrize("overrides", CONTRADICTIONS, ids=" ".join)
def test_contradictions(overrides: tuple[str, ...]) -> None:
    assert CONTRADICTIONS[overrides] in refusal(*overrides)


def test_valid_combinations() -> None:
    def left_out(*words: str) -> set[str]:
        loaded = recipe.load("digits", pairs(*words))
        return {name for name in recipe.SECTIONS if getattr(loaded, name) is None and name not in ("control", "search")}

    assert left_out("qat=null", "export.precisions=fp32,fp16") == {"teacher", "qat"}
    assert left_out("qat.calibrator=percentile", "qat.percentile=99.9", "qat.epochs=0") == {"teacher"}
    assert left_out("prune=null", "sparsify=null", "teacher.weights=a.pt", "baseline.weights=b.pt") == {
        "prune",
        "sparsify",
    }
    assert left_out("baseline.weights=given.pt") == {"teacher"}  # the file's baseline.epochs stays, for training it
    assert left_out("prune=null", "sparsify=null", "distill.teacher=self") == {"teacher", "prune", "sparsify"}
    assert left_out("export=null", "engine=null", "bench=null", "report=null") == {
        "teacher",
        "export",
        "engine",
        "bench",
        "report",
    }


def test_teacher_is_the_student_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"")
    (tmp_path / "b.pt").symlink_to(tmp_path / "a.pt")
    files = (f"teacher.weights={tmp_path}/a.pt", f"baseline.weights={tmp_path}/b.pt")
    assert "are the same model" in refusal("prune=null", "sparsify=null", *files)


def test_unknown_recipe() -> None:
    assert refusal(name="digit") == "no recipe 'digit', did you mean digits? (a file name ends in .yaml)"
    assert "shipped are bccd, bccd-fast, custom, digits, digits-l-to-s, neu_det, yolov8s-coco" in refusal(name="xyzzy")
    assert "gone.yaml: no such file" in refusal(name="gone.yaml")
    assert "no recipe ''" in refusal(name="")


@pytest.mark.parametrize("name", ["a b", "é", "日本", "x🙂", "a.b", "x" * 250])
def test_file_names_that_work(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.yaml").write_text(MINIMAL)
    assert recipe.load(str(tmp_path / f"{name}.yaml")).name == name


@pytest.mark.parametrize("name", ["store", "-x", ".hidden", "a\nb", "_"])
def test_file_names_that_cannot_name_a_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.yaml").write_text(MINIMAL)
    with pytest.raises(RecipeError, match="cannot be the name of a folder in weights/; rename the file") as caught:
        recipe.load(tmp_path / f"{name}.yaml")
    assert "\n" not in str(caught.value)


def test_recipe_is_frozen_and_hashable() -> None:
    loaded = recipe.load("digits")
    assert hash(loaded) == hash(recipe.load("digits"))
    with pytest.raises(ValueError, match="frozen"):
        loaded.prune.keep_flops = 0.9  # type: ignore[union-attr,misc]


def test_import_needs_no_torch() -> None:
    code = (
        "import sys; from yolo_compress.cli import grammar, helptext; "
        "from yolo_compress.recipe import recipe; recipe.load('digits'); helptext.help_text(); "
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
