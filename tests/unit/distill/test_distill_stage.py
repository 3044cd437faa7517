"""Checks of the stage before training, and training without labels or without data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from tests.support.noise_set import draw, noise_set
from tests.support.typed import validate
from yolo_compress.chain import plan
from yolo_compress.data.dataset import BadData, Dataset, load, with_held_back, with_unlabelled
from yolo_compress.distill.inversion import BATCH, _Misfit, invert, total_variation
from yolo_compress.distill.teacher import Frozen, Own, Peer
from yolo_compress.errors import CorruptArtifact, DataError, NumericsError, RecipeError
from yolo_compress.pipeline import run as run_pipeline
from yolo_compress.preflight import prepare
from yolo_compress.recipe import recipe
from yolo_compress.stages import Job, distill
from yolo_compress.stages._inverted_images import inverted_samples
from yolo_compress.stages.metrics import DistillMetrics
from yolo_compress.store.manifest import Artifact
from yolo_compress.store.store import Store
from yolo_compress.train import checkpoint, trainer
from yolo_compress.train.settings import TrainSettings

NAMES = ["bolt", "nut"]


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a data set, `student.pt` and `teacher.pt`."""
    monkeypatch.chdir(tmp_path)
    noise_set(tmp_path, train=4, val=2)
    for seed, name in enumerate(("student", "teacher")):
        save(tmp_path / f"{name}.pt", seed=seed)
    return tmp_path


def save(path: Path, yaml: str = "yolov8n.yaml", names: list[str] = NAMES, seed: int = 0) -> None:
    checkpoint.save_model(checkpoint.new_model(yaml, names, 3, seed), path)


def chosen(**sections: Any) -> recipe.Recipe:
    usual: dict[str, Any] = {
        "data": {"yaml": "set.yaml", "imgsz": 64},
        "teacher": {"weights": "teacher.pt"},
        "baseline": {"weights": "student.pt"},
        "distill": {"epochs": 1, "batch": 2, "close_mosaic": 0},
    }
    Path("r.yaml").write_text(json.dumps({**usual, **sections}))
    return recipe.load(Path("r.yaml"))


def check(**sections: Any) -> None:
    distill.check(chosen(**sections), load("set.yaml"))


# --- before any training --------------------------------------------------------------------------------------------


def test_a_pair_that_fits_passes(shop: Path) -> None:
    for config in ({}, {"teacher": "mutual"}, {"layers": ["model.15", "model.12=model.18"]}):
        check(distill=config)
    check(distill={"teacher": "self"}, teacher=None)
    check(teacher={"model": "yolov8s.yaml"}, baseline={"model": "yolov8n.yaml", "epochs": 1})
    check(teacher={"model": "yolov8s.yaml"}, baseline={"model": "yolo11n.yaml", "epochs": 1})


def test_a_smaller_teacher_is_said_and_accepted(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(teacher={"model": "yolov8n.yaml"}, baseline={"model": "yolov8s.yaml", "epochs": 1})
    assert "the teacher has fewer parameters (3," in capsys.readouterr().err
    check(teacher={"model": "yolov8s.yaml"}, baseline={"model": "yolov8n.yaml", "epochs": 1})
    assert "fewer parameters" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("yaml", "names", "message"),
    [
        (
            "yolov8n.yaml",
            ["nut", "bolt"],
            "teacher.weights=teacher.pt knows 2 classes.*They differ at 0: nut in the model",
        ),
        ("yolov8n.yaml", ["bolt"], "knows 1 classes, the data set has 2"),
        ("yolov8n-p2.yaml", NAMES, "teacher and student differ in levels: student 3, teacher 4"),
    ],
)
def test_a_teacher_that_does_not_fit(shop: Path, yaml: str, names: list[str], message: str) -> None:
    save(shop / "teacher.pt", yaml, names)
    with pytest.raises(RecipeError, match=message) as caught:
        check()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("yaml", ["yolov8n-seg.yaml", "yolov8n-cls.yaml"])
def test_a_teacher_of_another_task(shop: Path, yaml: str) -> None:
    from ultralytics.nn.tasks import ClassificationModel, SegmentationModel

    kind = SegmentationModel if "seg" in yaml else ClassificationModel
    net = kind(yaml, nc=2, verbose=False)
    torch.save({"model": net, "train_args": {}}, shop / "teacher.pt")
    with pytest.raises(RecipeError, match=r"teacher.pt: the head is (Segment|Classify), expected Detect"):
        check()


def test_a_teacher_of_nan_or_cut_short(shop: Path) -> None:
    net = checkpoint.new_model("yolov8n.yaml", NAMES, 3, 0)
    net.model[3].conv.weight.data[0] = float("nan")
    torch.save({"model": net, "train_args": {}}, shop / "teacher.pt")
    with pytest.raises(NumericsError, match=r"teacher.pt: model.3.conv.weight holds NaN or infinity"):
        check()
    (shop / "teacher.pt").write_bytes((shop / "student.pt").read_bytes()[:5000])
    with pytest.raises(CorruptArtifact, match=r"teacher.pt: not a loadable YOLO checkpoint"):
        check()


def test_a_teacher_that_is_a_copy_of_the_student(shop: Path) -> None:
    (shop / "teacher.pt").write_bytes((shop / "student.pt").read_bytes())
    with pytest.raises(RecipeError, match="teacher and student are the same model"):
        check()
    check(prune={})  # a pruned student differs from its teacher


def test_layers_that_do_not_fit(shop: Path) -> None:
    with pytest.raises(RecipeError, match=r"model.15 of the student is 8 x 8, model.18 of the teacher 4 x 4"):
        check(distill={"layers": ["model.15=model.18"]})


def test_a_feature_loss_of_ones_own_is_tried_and_is_in_the_fingerprint(shop: Path) -> None:
    mine = {"epochs": 1, "batch": 2, "close_mosaic": 0, "feature_loss": "mine.py:mine"}
    with pytest.raises(RecipeError, match="distill.feature_loss: no file 'mine.py'"):
        plan(chosen(distill=mine), load("set.yaml"), "distill")
    seen = []
    for body in ("(student - teacher).abs().mean()", "(student - teacher).square().mean()", "student - teacher"):
        (shop / "mine.py").write_text(f"def mine(student, teacher, weight):\n    return {body}\n")
        seen.append(plan(chosen(distill=mine), load("set.yaml"), "distill")["distill"])
        assert seen[-1].key["config"]["feature_loss"].keys() == {"sha256", "function"}
        if len(seen) < 3:
            check(distill=mine)
    assert len({planned.fingerprint for planned in seen}) == 3
    with pytest.raises(RecipeError, match="distill.feature_loss: mine.py:mine returns a tensor of shape"):
        check(distill=mine)


@pytest.mark.fault(79)
def test_nothing_runs_before_the_check(shop: Path) -> None:
    """A teacher that does not match is an error before hours of pruning."""
    save(shop / "teacher.pt", "yolov8n-p2.yaml")
    store = Store(shop / "weights")
    with pytest.raises(RecipeError, match="differ in levels"):
        run_pipeline(chosen(prune={"epochs": 1}), "distill", store=store)
    assert not list((shop / "weights" / "store").glob("*-*"))


# --- without labels -------------------------------------------------------------------------------------------------


def test_unlabelled_images_are_read_and_their_labels_are_not(shop: Path) -> None:
    draw(shop / "free" / "deep", 3, seed=9)
    (shop / "free" / "deep" / "0.txt").write_text("nonsense\n")
    dataset = load("set.yaml")
    found = with_unlabelled(dataset, "free")
    assert [sample.name for sample in found.unlabelled] == ["deep/0.png", "deep/1.png", "deep/2.png"]
    assert not any(sample.boxes for sample in found.unlabelled)
    assert found.train == dataset.train and found.digest == dataset.digest
    assert {sample.image for sample in found.unlabelled} <= {
        Path(path) for files in found.files for path in files.paths
    }, "rechecked at the end"


def test_folders_that_cannot_be_used(shop: Path) -> None:
    dataset = load("set.yaml")
    with pytest.raises(DataError, match=r"distill.images: no folder nowhere"):
        with_unlabelled(dataset, "nowhere")
    (shop / "empty").mkdir()
    with pytest.raises(DataError, match=r"distill.images: no image in empty"):
        with_unlabelled(dataset, "empty")
    draw(shop / "bad", 2, seed=9)
    (shop / "bad" / "1.png").write_bytes(b"not an image")
    with pytest.raises(BadData, match=r"bad/1.png: not an image of a known format"):
        with_unlabelled(dataset, "bad")
    assert len(with_unlabelled(dataset, "bad", on_bad="skip").unlabelled) == 1
    (shop / "seen").mkdir()
    (shop / "seen" / "x.png").write_bytes((shop / "images/val/1.png").read_bytes())
    with pytest.raises(BadData, match=r"images/val/1.png: same bytes as seen/x.png"):
        with_unlabelled(dataset, "seen")
    assert len(with_unlabelled(dataset, "seen", allow_overlap=True).unlabelled) == 1


def test_the_images_are_in_the_fingerprint(shop: Path) -> None:
    draw(shop / "free", 2, seed=9)
    of_recipe, dataset = chosen(distill={"images": "free"}), load("set.yaml")
    before = plan(of_recipe, with_unlabelled(dataset, "free"), "distill")["distill"].fingerprint
    draw(shop / "moved", 2, seed=9)
    elsewhere = chosen(distill={"images": "moved"})
    assert plan(elsewhere, with_unlabelled(dataset, "moved"), "distill")["distill"].fingerprint == before
    draw(shop / "free", 2, seed=10)
    assert plan(of_recipe, with_unlabelled(dataset, "free"), "distill")["distill"].fingerprint != before


def job(shop: Path, config: dict[str, Any], dataset: Dataset) -> Job:
    whole = chosen(distill={"epochs": 1, "batch": 2, "close_mosaic": 0, **config})
    made: dict[str, Artifact] = {}
    for need, name in (("prune", "student"), ("teacher", "teacher")):
        folder = shop / need
        folder.mkdir()
        (folder / "model.pt").write_bytes((shop / f"{name}.pt").read_bytes())
        made[need] = _Made(folder)  # type: ignore[assignment]
    (shop / "out").mkdir()
    (shop / "work").mkdir()
    return Job(whole.distill, whole, dataset, made, shop / "out", shop / "work")


class _Made:
    """The part of an artefact that the stage reads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics = {"map50_95": 0.0}

    def file(self, name: str) -> Path:
        return self.folder / name


def test_without_labels_the_labels_terms_are_zero_and_the_result_says_so(shop: Path) -> None:
    draw(shop / "free", 3, seed=9)
    dataset = with_unlabelled(load("set.yaml"), "free")
    metrics = distill.run(job(shop, {"images": "free"}, dataset))
    validate(metrics, DistillMetrics)
    assert metrics["trained_on"].startswith("3 images without labels, no label: mAP50-95 0.000 before, ")
    header, row = (line.split(",") for line in (shop / "out" / "results.csv").read_text().splitlines())
    values = dict(zip(header, row, strict=True))
    assert {float(values[f"train/{name}"]) for name in ("box_loss", "cls_loss", "dfl_loss")} == {0.0}
    assert float(values["train/kd_class"]) > 0 and float(values["train/kd_box"]) > 0


def test_without_data_the_images_are_made_kept_and_named(shop: Path) -> None:
    metrics = distill.run(job(shop, {"data_free": 2, "data_free_steps": 2}, load("set.yaml")))
    validate(metrics, DistillMetrics)
    assert metrics["trained_on"].startswith("2 images inverted from the teacher, no label: mAP50-95 0.000 before, ")
    files = sorted(path.name for path in (shop / "out" / "inverted").iterdir())
    assert files == ["000000.png", "000001.png"]
    with Image.open(shop / "out" / "inverted" / files[0]) as image:
        assert image.size == (64, 64) and image.mode == "RGB"


def test_all_but_qat_trains_in_bfloat16_on_a_cpu_made_for_it(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"amx_bf16": True})
    train, seen = trainer.train, {}

    def spy(model: torch.nn.Module, data: Dataset, settings: TrainSettings, *rest: Any) -> torch.nn.Module:
        seen[rest[-1]] = settings.bfloat16
        return train(model, data, settings, *rest)

    monkeypatch.setattr(trainer, "train", spy)
    run_pipeline(chosen(qat={"epochs": 1, "batch": 2, "calib_images": 2, "close_mosaic": 0}), "qat")
    assert seen == {"distill": True, "qat": False}


def test_labels_share_the_class_term_with_alpha_unless_there_are_none() -> None:
    net = checkpoint.new_model("yolov8n.yaml", NAMES, 3, 0)
    config = recipe.DistillConfig(alpha=0.25)
    assert distill.teaching(config, net).weights["kd_class"] == pytest.approx(0.125)
    unlabelled = recipe.DistillConfig(images="free")
    assert distill.teaching(unlabelled, net).weights["kd_class"] == pytest.approx(0.5)
    own = distill.teaching(recipe.DistillConfig(teacher="self"), net)
    assert [name for name, weight in own.weights.items() if weight] == ["kd_feature"]
    for name, kind in (("frozen", Frozen), ("mutual", Peer), ("self", Own)):
        assert type(distill.teaching(recipe.DistillConfig(teacher=name), net).source) is kind


# --- inversion ------------------------------------------------------------------------------------------------------


def misfit(net: torch.nn.Module, images: torch.Tensor) -> float:
    found = _Misfit([module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)])
    with torch.no_grad():
        net(images)
    found.remove()
    return float(found.take())


def seen_net() -> torch.nn.Module:
    """A small model with the BatchNorm averages of smooth grey images."""
    torch.manual_seed(3)
    layers: list[torch.nn.Module] = []
    for before, after in ((3, 8), (8, 16)):
        norm = torch.nn.BatchNorm2d(after, momentum=None)  # plain means
        layers += [torch.nn.Conv2d(before, after, 3, stride=2, padding=1), norm, torch.nn.SiLU()]
    net = torch.nn.Sequential(*layers).train()
    with torch.no_grad():
        for _ in range(30):
            coarse = 0.5 + 0.2 * torch.randn(8, 1, 4, 4)
            net(torch.nn.functional.interpolate(coarse, 64, mode="bilinear").clamp(0, 1).expand(-1, 3, -1, -1))
    return net.eval()


def test_inverted_images_meet_the_statistics_and_leave_the_teacher_as_it_was() -> None:
    net = seen_net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    needed = [parameter.requires_grad for parameter in net.parameters()]
    ((numbers, images),) = invert(net, 4, (64, 64), steps=30, seed=0)
    noise = torch.rand(4, 3, 64, 64)
    assert numbers == range(4) and images.shape == (4, 3, 64, 64)
    assert float(images.min()) >= 0 and float(images.max()) <= 1
    assert misfit(net, images) < 0.5 * misfit(net, noise)
    assert float(total_variation(images)) < 0.5 * float(total_variation(noise))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert [parameter.requires_grad for parameter in net.parameters()] == needed
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_total_variation_is_that_of_neighbours() -> None:
    images = torch.zeros(1, 3, 2, 2)
    images[0, 0, 0, 0] = 1.0  # differs from one neighbour below and one to the right
    assert float(total_variation(images)) == pytest.approx((2 / 4) ** 0.5)
    assert float(total_variation(torch.ones(2, 3, 4, 4))) == pytest.approx(0.0, abs=1e-5)


def test_a_batch_depends_on_its_place_alone() -> None:
    net = seen_net()
    count = BATCH + 2
    whole = {numbers.start: images for numbers, images in invert(net, count, (32, 32), steps=1, seed=5)}
    part = list(invert(net, count, (32, 32), steps=1, seed=5, skip=lambda numbers: numbers.start == 0))
    assert [numbers for numbers, _ in part] == [range(BATCH, count)]
    assert torch.equal(part[0][1], whole[BATCH])


def test_images_that_are_there_are_not_made_again(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = job(shop, {}, load("set.yaml"))
    net = seen_net()
    first = inverted_samples(now, net, 2, steps=1)
    (shop / "again").mkdir()
    monkeypatch.setattr("yolo_compress.distill.inversion._batch", lambda *_: pytest.fail("made again"))
    assert inverted_samples(replace(now, out=shop / "again"), net, 2, steps=1) == first
    assert {(sample.width, sample.height, sample.boxes) for sample in first} == {(64, 64, ())}


# --- images held back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(0.5, 0.4), (0.4, 0.5), (0.4, 0.4)])
def test_the_better_model_on_images_held_back_is_kept(
    shop: Path, monkeypatch: pytest.MonkeyPatch, before: float, after: float
) -> None:
    student, trained = (checkpoint.new_model("yolov8n.yaml", NAMES, 3, seed) for seed in (0, 1))
    data = with_held_back(load("set.yaml"), 0.5)
    asked: list[int] = []

    def measured(job: Job, samples: Any, model: nn.Module) -> float:
        assert samples == data.held
        asked.append(id(model))
        return before if model is student else after

    monkeypatch.setattr(distill, "map50_95", measured)
    monkeypatch.setattr(distill, "model_of", lambda *_: student)
    job = Job(None, chosen(), data, {}, shop, shop)
    model, held = distill._better(job, trained)
    assert model is (student if before > after else trained), "of two equal models the trained one"
    assert held == {"held_map50_95_before": before, "held_map50_95_after": after} and len(asked) == 2
    assert distill._better(replace(job, dataset=load("set.yaml")), trained) == (trained, {}) and len(asked) == 2


def test_held_back_images_are_in_the_fingerprint_and_nothing_else_changes_it(shop: Path) -> None:
    def stamps(**data: Any) -> dict[str, str]:
        made = chosen(data={"yaml": "set.yaml", "imgsz": 64, **data})
        return {
            stage: one.fingerprint for stage, one in plan(*prepare(made, Store(shop / "weights")), "distill").items()
        }

    none, half, most = stamps(), stamps(hold_back=0.5), stamps(hold_back=0.25)
    assert none == stamps(hold_back=0.0) and not set(none.values()) & set(half.values()) & set(most.values())
    assert all(none[stage] != half[stage] != most[stage] for stage in none)
