"""Controls: which ones a recipe has, how they are cut and trained, what they cost, and how the report splits the difference."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.report_case import built, document, rows
from tests.support.report_schema import validate
from yolo_compress.errors import RecipeError
from yolo_compress.evaluate.stored_detections import keep
from yolo_compress.prune.cost import conv_macs
from yolo_compress.prune.graph import prunable
from yolo_compress.recipe import controls, recipe
from yolo_compress.report import measurements
from yolo_compress.report.controls import added, steps
from yolo_compress.report.tables.control import control_table
from yolo_compress.stages import Job, control, distill
from yolo_compress.train import checkpoint

WORDS = [("control.nets", "auto"), ("data.imgsz", "64")]


def load(*overrides: str) -> recipe.Recipe:
    return recipe.load(
        "digits", [*WORDS, *((key, value) for key, _, value in (word.partition("=") for word in overrides))]
    )


# which controls


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), ("longer", "taught", "narrowed")),
        (("control.nets=taught",), ("taught",)),
        (("distill=null", "prune.teach_from_parent=false"), ("longer", "narrowed")),
        (("distill=null",), ("longer", "taught", "narrowed")),
        (("prune.epochs=0", "distill=null"), ("longer", "narrowed")),  # sparsify still trains
        (("prune.kind=two_four",), ("longer", "taught")),
        (("prune.kind=low_rank",), ("longer", "taught", "narrowed")),  # `narrowed` has the same MACs
        (("prune.epochs=0", "distill=null", "sparsify=null"), ()),
        (("prune=null", "sparsify=null"), ("longer",)),  # `taught` would be the compressed model itself
        (("prune.epochs=0", "sparsify=null", "distill.data_free=8", "distill.alpha=0.5"), ("taught", "narrowed")),
    ],
)
def test_which_controls_differ(overrides: tuple[str, ...], expected: tuple[str, ...]) -> None:
    if "prune=null" in overrides:
        overrides = (*overrides, "teacher.model=yolov8s.yaml")
    assert controls.chosen(load(*overrides)) == expected


def test_no_section_no_controls() -> None:
    assert controls.chosen(recipe.load("digits", [("control", "null")])) == ()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("prune.epochs=0", "distill=null", "sparsify=null", "control.nets=longer"), "this recipe can have no control"),
        (
            ("prune.kind=two_four", "control.nets=narrowed"),
            "narrowed needs prune.kind=channel or low_rank; this recipe can have longer, taught",
        ),
        (("distill=null", "prune.teach_from_parent=false", "control.nets=longer,taught"), "taught needs a teacher"),
        (("control.nets=wide",), "control.nets: got 'wide', expected"),
        (("control.max_minutes=0",), "control.max_minutes: got 0, expected"),
    ],
)
def test_refused_before_any_work(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message.replace(".", r"\.")):
        load(*overrides)


# the stage


def job(
    tmp_path: Path, *overrides: str, pruned_gflops: float = 1.0, dense_gflops: float = 2.0, seconds: float = 120.0
) -> Job:
    made = load(*overrides)
    inputs: Any = {
        stage: SimpleNamespace(
            metrics={"compute_gflops": pruned_gflops if stage == "prune" else dense_gflops},
            manifest=SimpleNamespace(seconds=seconds),
        )
        for stage in ("baseline", "teacher", "sparsify", "prune", "distill")
    }
    dataset: Any = SimpleNamespace(train=(), val=(), channels=3, names=("a", "b"))
    return Job(made.control, made, dataset, inputs, tmp_path / "out", tmp_path / "work")


def test_the_time_is_that_of_the_stages_that_are_repeated(tmp_path: Path) -> None:
    own = job(tmp_path)  # sparsify, prune and distill: 2 min each
    assert controls.trainings(own.recipe) == ["sparsify", "prune", "distill"]
    assert control.expected_minutes(job(tmp_path, "control.nets=narrowed")) == 6
    assert control.expected_minutes(own) == pytest.approx(6 + 2 * 6 / controls.PRUNED_STEP)
    assert control.expected_minutes(job(tmp_path, "control.nets=taught")) == pytest.approx(6 / controls.PRUNED_STEP)
    assert control.expected_minutes(job(tmp_path, "prune.kind=two_four")) == 12, "the chain trained dense models itself"
    unlabelled = ("distill.data_free=8", "distill.alpha=0.5", "prune.kind=two_four")
    assert control.expected_minutes(job(tmp_path, *unlabelled)) == 4 + 6, "`longer` cannot train without labels"
    assert controls.epochs(own.recipe) == 19 and controls.epochs(load(*unlabelled), "longer") == 13


def test_the_cost_is_said_before_any_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nothing: Any = None
    control.check(load("distill=null", "sparsify=null", "control.nets=taught"), nothing)
    control.check(load(), nothing)
    assert capsys.readouterr().err.splitlines() == [
        "control: taught will train for up to 10 epochs, the epochs of prune; control=null leaves the controls out",
        "control: longer, taught, narrowed will each train for up to 19 epochs, the epochs of sparsify, prune and distill; "
        "control=null leaves the controls out",
    ]


def test_without_a_training_there_is_nothing_to_repeat(tmp_path: Path) -> None:
    found = control.run(job(tmp_path, "prune.epochs=0", "distill=null", "sparsify=null"))
    assert found == {"models": {}, "expected_minutes": 0.0, "skipped": "no stage trains in this recipe"}


def test_above_max_minutes_nothing_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_trained", lambda *_: pytest.fail("it trained"))
    found = control.run(job(tmp_path, "control.max_minutes=24"))
    assert (
        found["models"] == {} and found["skipped"] == "they would take about 24 min, more than control.max_minutes=24"
    )
    shown = measurements.control(
        SimpleNamespace(
            recipe=load(),
            inputs={"control": SimpleNamespace(metrics=found, file=lambda name: pytest.fail(name))},
            dataset=None,
        )
    )
    assert shown == {"steps": [], "best": None, "retention": None, "skipped": found["skipped"]}


@pytest.mark.parametrize("share", [0.7, 0.5, 0.25])
def test_narrowed_keeps_the_first_channels_of_every_layer_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    monkeypatch.setattr(control, "calibration_samples", lambda *_: [])
    monkeypatch.setattr(control, "letterboxed", lambda *_: [])
    monkeypatch.setattr(control, "reestimate_batchnorm", lambda *_: 0)
    dense = checkpoint.new_model("yolov8n.yaml", ("a", "b"), 3, 0)
    model = checkpoint.new_model("yolov8n.yaml", ("a", "b"), 3, 0)
    own = job(tmp_path, pruned_gflops=2.0 * share)
    control.narrow(Job(own.recipe.prune, own.recipe, own.dataset, own.inputs, own.out, own.work), model)
    assert conv_macs(model, (64, 64)) / conv_macs(dense, (64, 64)) == pytest.approx(share, rel=0.02)
    after = {group.name: group.width for group in prunable(model)}
    ratios = [after[group.name] / group.width for group in prunable(dense) if group.width >= 128]
    assert max(ratios) - min(ratios) <= 16 / 128, "one ratio, up to a block of channels"
    kept = model.get_submodule("model.0.conv").weight
    assert torch.equal(kept, dense.get_submodule("model.0.conv").weight[: len(kept)])


def test_each_control_lacks_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainings of each control: which model of which stage, with how many epochs, and with which teachers."""
    called: list[tuple[str, int, bool]] = []

    def fit(own: Job, model: nn.Module, hooks: Any, what: str) -> nn.Module:
        called.append((what, own.config.epochs, bool(hooks)))
        return model

    def tuned(own: Job, model: nn.Module, what: str) -> nn.Module:
        return fit(own, model, [1] if own.config.teach_from_parent else [], what)

    def taught(own: Job, student: nn.Module, what: str) -> tuple[nn.Module, None]:
        return fit(own, student, [1], what), None

    monkeypatch.setattr(control, "model_of", lambda *_: nn.Identity())
    monkeypatch.setattr(control, "fit", fit)
    monkeypatch.setattr(control, "tuned", tuned)
    monkeypatch.setattr(distill, "taught", taught)
    monkeypatch.setattr(control, "narrow", lambda own, model: called.append((f"cut in {own.work.name}", 0, False)))
    (tmp_path / "work").mkdir()
    own = job(tmp_path, "sparsify.epochs=2", "prune.epochs=5", "prune.rounds=2", "distill.epochs=4")
    expected = {
        "longer": [("sparsify", 2, False), ("prune 1/2", 2, False), ("prune 2/2", 3, False), ("distill", 4, False)],
        "taught": [("sparsify", 2, False), ("prune 1/2", 2, True), ("prune 2/2", 3, True), ("distill", 4, True)],
    }
    expected["narrowed"] = [expected["taught"][0], ("cut in prune", 0, False), *expected["taught"][1:]]
    for net, runs in expected.items():
        called.clear()
        shutil.rmtree(own.out, ignore_errors=True)
        own.out.mkdir()
        control._trained(own, net)  # type: ignore[arg-type]
        named = [(what.replace(f" of control {net}", ""), epochs, teacher) for what, epochs, teacher in called]
        assert named == runs


# the report


def figures(map50_95: float, **changes: Any) -> dict[str, Any]:
    return {"map50_95": map50_95, "map50": 0.9, "compute_gflops": 2.0, "parameters": 3_000_000, "epochs": 9, **changes}


def test_the_steps_sum_to_the_whole_difference() -> None:
    whole = {"baseline": 0.6, "longer": 0.61, "taught": 0.625, "narrowed": 0.6, "compressed": 0.613}
    found = steps(added(load()), {name: figures(value) for name, value in whole.items()})
    assert [step["name"] for step in found] == list(whole)
    assert [step["change"] for step in found[1:]] == pytest.approx([0.01, 0.015, -0.025, 0.013])
    assert [step["adds"] for step in found] == [
        [], ["longer training"], ["the teacher"], ["fewer channels in every layer"], ["the choice of channels", "sparse training"],
    ]  # fmt: skip
    fewer = steps(
        added(load("sparsify=null")), {name: figures(whole[name]) for name in ("baseline", "narrowed", "compressed")}
    )
    assert [step["adds"] for step in fewer[1:]] == [
        ["longer training", "the teacher", "fewer channels in every layer"], ["the choice of channels"],
    ]  # fmt: skip
    assert fewer[1]["change"] == pytest.approx(0.0)
    table = control_table({"steps": found, "best": None, "retention": None, "skipped": None})
    assert table.notes[-1] == (
        "Of +0.013 from the baseline to the compressed model: +0.010 longer training, +0.015 the teacher, "
        "-0.025 fewer channels in every layer, +0.013 the choice of channels and sparse training."
    )


def test_the_verdict_compares_with_the_best_control() -> None:
    found = steps(
        added(load()),
        {"baseline": figures(0.6), "longer": figures(0.61), "narrowed": figures(0.605), "compressed": figures(0.6)},
    )
    given = {"steps": found, "best": None, "retention": None, "skipped": None}
    made = document(rows(0.59), control=given)
    validate(made)
    assert made["control"]["best"] == "longer"
    assert made["control"]["retention"] == pytest.approx(0.59 / 0.61)
    assert "; 96.7 % of the best control (the baseline, trained for the same epochs)" in made["verdict"]["line"]
    without = document(rows(0.59))
    assert without["control"] is None and "control" not in without["verdict"]["line"]
    nothing = built(rows(0.59), control={**given, "steps": [], "skipped": "too long"})
    assert nothing["control"]["retention"] is None and "control" not in nothing["verdict"]["line"]


def test_the_intervals_are_of_each_change_over_the_same_images(tmp_path: Path) -> None:
    box = np.array([[10, 10, 40, 40, 0.9, 0]], np.float32)
    truths = [SimpleNamespace(width=64, height=64, boxes=((0, 25 / 64, 25 / 64, 30 / 64, 30 / 64),)) for _ in range(20)]
    every, half = [box] * 20, [box if i % 2 else box[:0] for i in range(20)]
    artifacts = {}
    for name, found in (("baseline", half), ("distill", every)):
        keep(tmp_path / f"{name}.npy", found)
        artifacts[name] = SimpleNamespace(
            metrics=figures(0.5 if name == "baseline" else 1.0),
            manifest=SimpleNamespace(files={"detections.npy"}),
            file=lambda _, name=name: tmp_path / f"{name}.npy",
        )
    keep(tmp_path / "longer.npy", half)
    artifacts["control"] = SimpleNamespace(
        metrics={"models": {"longer": figures(0.5)}, "expected_minutes": 1.0, "skipped": None},
        file=lambda name: tmp_path / name.replace("/detections", ""),
    )
    made = load("report.ab_replicates=50", "control.nets=longer")
    dataset = SimpleNamespace(names=("a",), val=truths)
    found = measurements.control(SimpleNamespace(recipe=made, inputs=artifacts, dataset=dataset))  # type: ignore[arg-type]
    assert found is not None
    baseline, longer, compressed = found["steps"]
    assert "change_low" not in baseline
    assert [step["epochs"] for step in found["steps"]] == [0, 9, 19], (
        "of the recipe: 3 of sparsify, 10 of prune, 6 of distill"
    )
    assert longer["change"] == longer["change_low"] == longer["change_high"] == 0.0
    assert compressed["change_low"] < compressed["change"] < compressed["change_high"] and compressed["change_low"] > 0
