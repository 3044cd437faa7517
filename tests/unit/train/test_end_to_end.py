"""A YOLO26 trains as in Ultralytics: the losses of both sets of branches, their weights in each epoch, and validation without NMS."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from ultralytics.cfg import get_cfg
from ultralytics.models.yolo.detect import DetectionValidator
from ultralytics.utils.loss import E2ELoss

from tests.support.noise_set import noise_set
from yolo_compress.data.dataset import Dataset, load
from yolo_compress.nets import detect
from yolo_compress.train import checkpoint, trainer
from yolo_compress.train.hook import TrainHook
from yolo_compress.train.settings import TrainSettings
from yolo_compress.train.trainer import HookedTrainer

NAMES = ["bolt", "nut"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return load(str(noise_set(tmp_path_factory.mktemp("set"), train=4, val=2, names=NAMES)))


def model(seed: int = 0) -> nn.Module:
    return checkpoint.new_model("yolo26n.yaml", NAMES, 3, seed)


def settings(**changes: object) -> TrainSettings:
    return TrainSettings(**{"epochs": 3, "batch": 2, "imgsz_px": 64, "lr0": 1e-3, "threads": 1, **changes})  # type: ignore[arg-type]


def batch() -> dict[str, torch.Tensor]:
    return {
        "img": torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
        "batch_idx": torch.tensor([0.0, 1.0, 1.0]),
        "cls": torch.tensor([[0.0], [1.0], [0.0]]),
        "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.3, 0.4, 0.2, 0.5], [0.6, 0.6, 0.3, 0.3]]),
    }


def test_the_loss_and_its_gradient_are_ultralytics_in_every_epoch() -> None:
    net = model().train()
    net.args = get_cfg(overrides={"epochs": 3})
    ours, theirs = trainer._HookedCriterion(net, []), E2ELoss(net)
    assert ours.loss_names == ("box_loss", "cls_loss", "l1_loss")
    for epoch in range(3):
        ours.start_epoch(epoch, 3)
        found = []
        for criterion in (ours, theirs):
            net.zero_grad()
            loss, items = criterion(net(batch()["img"]), batch())
            loss.sum().backward()
            found.append((loss.detach(), items, {name: p.grad.clone() for name, p in net.named_parameters()}))
        torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-7)
        for name, gradient in found[1][2].items():
            torch.testing.assert_close(found[0][2][name], gradient, rtol=1e-4, atol=1e-6)
        assert found[0][1].keys() == found[1][1].keys()
        assert 3 * sum(found[0][1].values()) == pytest.approx(float(found[0][0].sum()), rel=1e-5)
        theirs.update()  # as their trainer does after each epoch
    assert theirs.o2m == pytest.approx(0.1) and ours.base.o2m == pytest.approx(0.1)


class Watch(TrainHook):
    """Records the weights of the losses and fails in the epoch `fails`."""

    def __init__(self, fails: int = -1) -> None:
        self.fails, self.seen = fails, list[tuple[int, float, float]]()

    def on_model(self, model: nn.Module) -> None:
        self._model = model

    def on_epoch_start(self, epoch: int, epochs: int) -> None:
        if epoch == self.fails:
            raise KeyboardInterrupt
        base = self._model.criterion.base
        self.seen.append((epoch, round(base.o2m, 9), round(base.o2o, 9)))


def test_the_weights_of_the_losses_are_those_of_the_epoch_also_after_a_resume(dataset: Dataset, tmp_path: Path) -> None:
    killed, resumed = Watch(fails=1), Watch()
    with pytest.raises(KeyboardInterrupt):
        trainer.train(model(), dataset, settings(), [killed], tmp_path, "t")
    after = trainer.train(model(), dataset, settings(), [resumed], tmp_path, "t")
    assert killed.seen == [(0, 0.8, 0.2)] and resumed.seen == [(1, 0.45, 0.55), (2, 0.1, 0.9)]
    before = model().state_dict()
    moved = {name for name, tensor in after.state_dict().items() if not torch.equal(tensor, before[name])}
    for branch in ("cv2", "cv3", "one2one_cv2", "one2one_cv3"):
        assert f"model.23.{branch}.0.2.bias" in moved
    checkpoint.save_model(after, tmp_path / "after.pt")
    loaded = checkpoint.load_model(tmp_path / "after.pt")
    assert not {"_end2end", "max_det", "agnostic_nms"} & vars(loaded.model[-1]).keys()


def test_validation_in_training_takes_the_one_to_one_branches(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, torch.Size]] = []
    original = DetectionValidator.postprocess

    def watched(self: DetectionValidator, preds: object) -> object:
        seen.append((self.end2end, preds[0].shape))  # type: ignore[index]
        return original(self, preds)

    monkeypatch.setattr(DetectionValidator, "postprocess", watched)
    trainer.train(model(), dataset, settings(epochs=1, val_every=1), [], tmp_path, "t")
    assert seen and {end for end, _ in seen} == {True} and {shape[2] for _, shape in seen} == {6}


def test_other_models_train_as_before(dataset: Dataset, tmp_path: Path) -> None:
    net = checkpoint.new_model("yolov8n.yaml", NAMES, 3, 0)
    built = HookedTrainer(net, dataset, settings(), [], tmp_path, "t")
    built.setup_model()
    assert built.args.nms is None and detect.needs_nms(net)
    criterion = trainer._HookedCriterion(net, [])
    criterion.start_epoch(1, 3)
    assert criterion.loss_names == ("box_loss", "cls_loss", "dfl_loss") and not hasattr(criterion.base, "o2m")
    built.close()
