"""Frozen, mutual and self-distillation: which models have gradients, which are trained, and what checkpoints contain."""

from __future__ import annotations

import csv
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support.noise_set import noise_set
from yolo_compress.data.dataset import Dataset, load
from yolo_compress.distill.hook import Teach
from yolo_compress.distill.teacher import Frozen, Own, Peer, check_pair
from yolo_compress.errors import NumericsError, RecipeError
from yolo_compress.train import checkpoint, trainer
from yolo_compress.train.settings import TrainSettings
from yolo_compress.train.trainer import HookedTrainer

NAMES = ["bolt", "nut"]
HEAD = {"class_weight": 1.0, "box_weight": 1.0, "iou_weight": 1.0}


def model(seed: int, yaml: str = "yolov8n.yaml", names: list[str] = NAMES) -> nn.Module:
    return checkpoint.new_model(yaml, names, 3, seed)


def batch() -> dict[str, torch.Tensor]:
    return {
        "img": torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
        "batch_idx": torch.tensor([0.0, 1.0]),
        "cls": torch.tensor([[0.0], [1.0]]),
        "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.3, 0.4, 0.2, 0.5]]),
    }


def taught(hook: Teach, student: nn.Module) -> dict[str, torch.Tensor]:
    hook.on_model(student)
    hook.on_epoch_start(0, 2)
    return hook.extra_loss(batch(), student(batch()["img"]))


def gradients(net: nn.Module) -> dict[str, bool]:
    return {name: p.grad is not None and bool(p.grad.any()) for name, p in net.named_parameters()}


# --- frozen ---------------------------------------------------------------------------------------------------------


def test_without_mixed_precision_the_teacher_stays_in_float32() -> None:
    source = Frozen(model(0))
    source.outputs(batch()["img"], {})
    assert {parameter.dtype for parameter in source.net.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("device", "kind"), [("cpu", torch.bfloat16), pytest.param("cuda", torch.float16, marks=pytest.mark.gpu)]
)
def test_with_mixed_precision_its_convolutions_are_kept_in_it_and_its_scores_stay(
    device: str, kind: torch.dtype
) -> None:
    net = model(0).to(device)
    images = batch()["img"].to(device)
    expected = Frozen(deepcopy(net)).outputs(images, {})["scores"]
    source = Frozen(net)
    with torch.autocast(device):
        scores = source.outputs(images, {})["scores"]
    assert {m.weight.dtype for m in net.modules() if isinstance(m, nn.Conv2d)} == {kind}
    assert {m.weight.dtype for m in net.modules() if isinstance(m, nn.BatchNorm2d)} == {torch.float32}
    torch.testing.assert_close(scores.float(), expected, rtol=0.02, atol=0.05)


def test_other_classes_levels_and_strides_are_refused_with_both() -> None:
    with pytest.raises(RecipeError, match=r"differ in classes: student \['bolt', 'nut'\], teacher \['nut', 'bolt'\]"):
        check_pair(model(0), model(0, names=["nut", "bolt"]))
    with pytest.raises(RecipeError, match=r"differ in levels: student 3, teacher 4"):
        check_pair(model(0), model(0, "yolov8n-p2.yaml"))
    other = model(0)
    other.model[-1].stride = other.model[-1].stride * 2
    with pytest.raises(
        RecipeError, match=r"differ in strides: student \[8.0, 16.0, 32.0\], teacher \[16.0, 32.0, 64.0\]"
    ):
        check_pair(model(0), other)
    with pytest.raises(
        RecipeError, match="differ in branches of the head: student one-to-many and one-to-one, teacher one-"
    ):
        check_pair(model(0, "yolo26n.yaml"), model(0, "yolo11s.yaml"))


# --- mutual ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("yamls", [("yolov8n.yaml", "yolov8s.yaml"), ("yolo26n.yaml", "yolo26s.yaml")])
def test_each_of_two_students_has_gradients_of_its_own_terms_only(yamls: tuple[str, str]) -> None:
    student, peer = model(1, yamls[0]).train(), model(0, yamls[1])
    losses = taught(Teach(Peer(peer), feature_weight=1.0, **HEAD), student)
    assert list(losses) == ["kd_feature", "kd_class", "kd_box", "kd_iou", "peer"]
    sum(value for name, value in losses.items() if name != "peer").backward()
    assert not any(gradients(peer).values()) and gradients(student)["model.0.conv.weight"]
    student.zero_grad()
    losses["peer"].backward()
    assert not any(gradients(student).values())
    assert all(found for name, found in gradients(peer).items() if "dfl" not in name)


def test_a_peer_takes_its_detection_loss_and_the_head_terms() -> None:
    student, peer = model(1).train(), model(0)
    alone = deepcopy(peer).train()
    losses = taught(Teach(Peer(peer), feature_weight=0.0, class_weight=2.0), student)
    outputs = alone(batch()["img"])
    detection = alone.init_criterion()(outputs, batch())[0].sum() / 2
    mutual = Teach(Frozen(model(2)), feature_weight=0.0, class_weight=2.0)._head_loss(
        outputs, {k: v.detach() for k, v in student(batch()["img"]).items() if k != "feats"}
    )
    assert float(losses["peer"].detach()) == pytest.approx(float((detection + mutual).detach()), rel=1e-5)


# --- self -----------------------------------------------------------------------------------------------------------


def test_deep_layers_teach_shallow_ones_and_are_not_taught() -> None:
    student = model(1).train()
    hook = Teach(Own(), feature_weight=1.0, class_weight=0.0)
    losses = taught(hook, student)
    assert list(losses) == ["kd_feature"]
    losses["kd_feature"].backward()
    found = gradients(student)
    assert found["model.4.cv2.conv.weight"] and found["model.9.cv2.conv.weight"]
    assert not any(found[name] for name in found if int(name.split(".")[1]) > 9)
    assert [(a.in_channels, a.out_channels) for a in hook.modules().values()] == [(64, 64), (128, 128), (256, 256)]


def test_a_layer_cannot_teach_itself() -> None:
    with pytest.raises(RecipeError, match=r"model.15 cannot teach itself; write SHALLOW=DEEP"):
        taught(Teach(Own(), feature_weight=1.0, class_weight=0.0, layers=["model.15"]), model(1).train())


# --- in the training loop -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return load(str(noise_set(tmp_path_factory.mktemp("set"), train=4, val=2)))


def trained(dataset: Dataset, hook: Teach, work: Path, epochs: int = 1, student: nn.Module | None = None) -> nn.Module:
    work.mkdir(exist_ok=True)
    torch.manual_seed(7)
    settings = TrainSettings(epochs=epochs, batch=2, imgsz_px=64, optimizer="AdamW", lr0=1e-3)
    return trainer.train(student or model(1), dataset, settings, [hook], work, "t")


def test_terms_and_shares_are_logged_and_extras_stay_out_of_the_checkpoint(dataset: Dataset, tmp_path: Path) -> None:
    peer, student = model(0), model(1)
    before = {name: tensor.clone() for name, tensor in peer.state_dict().items()}
    hook = Teach(Peer(peer), feature_weight=1.0, **HEAD, feature_loss="mgd")
    net = trained(dataset, hook, tmp_path / "work", student=student)
    (row,) = csv.DictReader((tmp_path / "work" / "results.csv").read_text().splitlines())
    names = ["kd_feature", "kd_class", "kd_box", "kd_iou", "peer"]
    detection = sum(float(row[f"train/{name}"]) for name in ("box_loss", "cls_loss", "dfl_loss"))
    assert float(row["train/total"]) == pytest.approx(
        detection + sum(float(row[f"train/{n}"]) for n in names), rel=1e-4
    )
    for name in names:
        share = float(row[f"train/{name}"]) / float(row["train/total"])
        assert 0 < float(row[f"share/{name}"]) == pytest.approx(share, rel=1e-2)
    moved = [name for name, tensor in peer.state_dict().items() if not torch.equal(before[name], tensor)]
    assert {"model.0.conv.weight", "model.0.bn.running_mean"} <= set(moved) and "model.22.dfl.conv.weight" not in moved
    assert net.state_dict().keys() == model(1).state_dict().keys()
    assert not any(module._forward_hooks for tapped in (net, student, peer) for module in tapped.modules())


def test_taps_are_gone_after_a_failure(dataset: Dataset, tmp_path: Path) -> None:
    student, teacher = model(1), model(0)
    teacher.model[-1].cv3[0][2].bias.data[:] = float("nan")
    with pytest.raises(NumericsError, match="kd_class is nan at the first batch"):
        trained(
            dataset, Teach(Frozen(teacher), feature_weight=0.0, class_weight=1.0), tmp_path / "nan", student=student
        )
    teacher = model(0)
    hook = Teach(Frozen(teacher), feature_weight=float("inf"), class_weight=0.0)
    with pytest.raises(NumericsError, match="kd_feature"):
        trained(dataset, hook, tmp_path / "work", student=student)
    assert not any(module._forward_hooks for tapped in (student, teacher) for module in tapped.modules())


class _Stop(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mutual", "mgd"])
def test_resumed_equals_uninterrupted(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A resumed run restores the peer, the generators and the schedule."""
    whole_save, when = HookedTrainer.save_model, [-1]

    def save_model(self: HookedTrainer) -> bool:
        saved = whole_save(self)
        if self.epoch == when[0]:
            raise _Stop
        return saved

    monkeypatch.setattr(HookedTrainer, "save_model", save_model)

    def run(work: Path) -> dict[str, torch.Tensor]:
        source = Peer(model(0)) if kind == "mutual" else Frozen(model(0))
        hook = Teach(source, feature_weight=1.0, class_weight=1.0, feature_loss="mgd", ramp_epochs=2.0, off_epochs=1)
        net = trained(dataset, hook, work, epochs=3)
        return {**net.state_dict(), **{f"extra.{name}": value for name, value in hook.modules().state_dict().items()}}

    whole = run(tmp_path / "whole")
    when[0] = 0
    with pytest.raises(_Stop):
        run(tmp_path / "killed")
    when[0] = -1
    resumed = run(tmp_path / "killed")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
