"""Transfer: every tensor that fits is the checkpoint's, class outputs start as Ultralytics', and what cannot start is refused."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from ultralytics.nn.tasks import DetectionModel, OBBModel, PoseModel, SegmentationModel

from tests.support.noise_set import noise_set
from yolo_compress.data.dataset import Dataset, load
from yolo_compress.errors import RecipeError
from yolo_compress.prune.graph import prunable, prune
from yolo_compress.recipe.sections import SourceConfig
from yolo_compress.stages import _load_or_train
from yolo_compress.train import checkpoint, trainer, transfer
from yolo_compress.train.settings import TrainSettings

EIGHTY = [f"thing {i}" for i in range(79)] + ["Nut "]
NAMES = ["bolt", "nut"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of NAMES and checkpoints of other classes and kinds."""
    root = tmp_path_factory.mktemp("shop")
    noise_set(root, train=4, val=2, names=NAMES)
    save(root / "eighty.pt", checkpoint.new_model("yolov8n.yaml", EIGHTY, 3, seed=1))
    return root


@pytest.fixture(scope="module")
def dataset(folder: Path) -> Dataset:
    return load(str(folder / "set.yaml"))


def save(path: Path, model: nn.Module) -> None:
    with torch.no_grad():  # nothing as it was made, so that what is equal was taken
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.01)
    checkpoint.save_model(model, path)


def of_task(kind: type[DetectionModel], yaml: str, classes: int) -> DetectionModel:
    model = kind(yaml, ch=3, nc=classes, verbose=False)
    model.names = {i: f"thing {i}" for i in range(classes)}
    return model


def outputs(model: nn.Module) -> set[str]:
    """Names of the class outputs' tensors."""
    return {name for name in model.state_dict() if re.match(r"model\.2[23]\.(one2one_)?cv3\.\d\.2\.", name)}


def test_all_tensors_but_the_class_outputs_are_the_checkpoints(folder: Path) -> None:
    model, taken = transfer.load_pretrained(folder / "eighty.pt", ["x", "y", "z"], seed=0)
    before, after = checkpoint.load_model(folder / "eighty.pt").state_dict(), model.state_dict()
    assert before.keys() == after.keys() and len(outputs(model)) == 6
    for name in before.keys() - outputs(model):
        assert torch.equal(before[name], after[name]), name
    assert (taken.tensors, taken.of_tensors, taken.classes) == (len(after) - 6, len(after), ())
    fresh = sum(after[name].numel() for name in outputs(model))
    assert (taken.parameters, taken.of_parameters) == (ultra_parameters(model) - fresh, ultra_parameters(model))


def ultra_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_class_biases_start_as_ultralytics_does(folder: Path) -> None:
    """log(5 / classes / cells of a 640 px image), one object in a hundred images a cell."""
    model, _ = transfer.load_pretrained(folder / "eighty.pt", ["x", "y", "z"], seed=0)
    for level, stride in enumerate((8, 16, 32)):
        bias = model.model[-1].cv3[level][-1].bias
        torch.testing.assert_close(bias, torch.full((3,), math.log(5 / 3 / (640 / stride) ** 2)))


def test_the_model_detects_the_new_classes(folder: Path) -> None:
    model, _ = transfer.load_pretrained(folder / "eighty.pt", NAMES, seed=0)
    assert (model.names, model.nc, model.model[-1].nc, model.yaml["nc"]) == ({0: "bolt", 1: "nut"}, 2, 2, 2)
    assert model.eval()(torch.zeros(1, 3, 64, 64))[0].shape == (1, 4 + 2, 84)


def test_outputs_of_classes_of_the_same_name_are_taken(folder: Path) -> None:
    """Case and outer blanks aside, in whatever order."""
    model, taken = transfer.load_pretrained(folder / "eighty.pt", NAMES, seed=0)
    theirs = checkpoint.load_model(folder / "eighty.pt").model[-1].cv3
    for mine, other in zip(model.model[-1].cv3, theirs, strict=True):
        assert torch.equal(mine[-1].weight[1], other[-1].weight[79]) and mine[-1].bias[1] == other[-1].bias[79]
        assert not torch.equal(mine[-1].weight[0], other[-1].weight[0])
    assert taken.classes == ("nut",)


def test_a_checkpoint_of_the_same_classes_is_taken_whole(folder: Path, dataset: Dataset) -> None:
    save(folder / "same.pt", checkpoint.new_model("yolov8n.yaml", NAMES, 3, seed=2))
    model, taken = transfer.load_pretrained(folder / "same.pt", NAMES, seed=0)
    before, after = checkpoint.load_model(folder / "same.pt").state_dict(), model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert taken.tensors == taken.of_tensors and taken.parameters == taken.of_parameters
    said: list[str] = []
    _load_or_train.start(SourceConfig(pretrained=str(folder / "same.pt")), dataset, 0, "baseline", said.append)
    assert "baseline.weights loads it without training" in said[0]


def test_weights_are_suggested_only_where_they_would_be_taken(folder: Path, dataset: Dataset) -> None:
    """A checkpoint that knows these classes among others, or in another order, is no finished detector of them."""
    for number, names in enumerate((["nut", "bolt"], ["bolt", "nut", "screw"], ["Bolt", "nut"])):
        path = folder / f"near{number}.pt"
        checkpoint.save_model(checkpoint.new_model("yolov8n.yaml", names, 3, seed=2), path)
        said: list[str] = []
        _load_or_train.start(SourceConfig(pretrained=str(path)), dataset, 0, "baseline", said.append)
        assert "its class outputs are copied by name" in said[0] and "weights" not in said[0]


def test_new_outputs_are_a_function_of_the_seed_alone(folder: Path) -> None:
    state = torch.random.get_rng_state()
    one, other = (transfer.load_pretrained(folder / "eighty.pt", ["x"], seed=7)[0].state_dict() for _ in range(2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(one[name], other[name]) for name in one)
    third = transfer.load_pretrained(folder / "eighty.pt", ["x"], seed=8)[0].state_dict()
    assert not torch.equal(one["model.22.cv3.0.2.weight"], third["model.22.cv3.0.2.weight"])


def test_a_pruned_checkpoint_keeps_its_widths(folder: Path) -> None:
    model = checkpoint.new_model("yolov8n.yaml", EIGHTY, 3, seed=1)
    prune(model, {prunable(model)[0].name: torch.arange(8)})
    save(folder / "pruned.pt", model)
    again, _ = transfer.load_pretrained(folder / "pruned.pt", NAMES, seed=0)
    assert again.model[0].conv.out_channels == 8
    assert again.eval()(torch.zeros(1, 3, 64, 64))[0].shape == (1, 6, 84)


@pytest.mark.parametrize(
    ("kind", "yaml"),
    [
        (SegmentationModel, "yolov8n-seg.yaml"),
        (OBBModel, "yolov8n-obb.yaml"),
        (PoseModel, "yolov8n-pose.yaml"),
        (SegmentationModel, "yolo11n-seg.yaml"),
        (SegmentationModel, "yolo26n-seg.yaml"),
        (OBBModel, "yolo26n-obb.yaml"),
    ],
)
def test_the_detection_part_of_another_task(folder: Path, kind: type[DetectionModel], yaml: str) -> None:
    model, path = of_task(kind, yaml, 4), folder / f"{yaml}.pt"
    torch.save({"model": model, "ema": None, "train_args": {}}, path)
    with pytest.raises(RecipeError, match="expected a detector; set detection_part=true"):
        transfer.load_pretrained(path, NAMES, seed=0)
    part, taken = transfer.load_pretrained(path, NAMES, seed=0, detection_part=True)
    assert type(part.model[-1]).__name__ == "Detect" and taken.of_tensors == taken.tensors + len(outputs(part))
    before, after = model.state_dict(), part.state_dict()
    assert all(torch.equal(before[name].float(), after[name]) for name in after.keys() - outputs(part))
    checkpoint.save_model(part, folder / "part.pt")
    assert checkpoint.load_model(folder / "part.pt").names == {0: "bolt", 1: "nut"}


@pytest.mark.parametrize(
    ("yaml", "channels", "message"),
    [
        (
            "yolo12n.yaml",
            3,
            "baseline.pretrained=.*model.6 is a A2C2f; supported are YOLOv8 detection models: .*; YOLO11 det",
        ),
        ("yolov8n-ghost.yaml", 3, r"model.1 is a GhostConv; supported are"),
        ("yolov8n.yaml", 1, "takes 1 image channels, the data set has 3"),
        ("yolov10n.yaml", 3, "head is v10Detect, expected Detect|a checkpoint for .*v10Detect"),
    ],
)
def test_what_cannot_be_compressed_is_refused(
    folder: Path, dataset: Dataset, yaml: str, channels: int, message: str
) -> None:
    model = DetectionModel(yaml, ch=channels, nc=80, verbose=False)
    model.names = dict(enumerate(EIGHTY))
    path = folder / f"{yaml}-{channels}.pt"
    torch.save({"model": model, "ema": None, "train_args": {}}, path)
    with pytest.raises(RecipeError, match=message):
        _load_or_train.start(SourceConfig(pretrained=str(path)), dataset, 0, "baseline")


def test_weights_of_other_classes_name_the_way_on(folder: Path, dataset: Dataset) -> None:
    config = SourceConfig(weights=str(folder / "eighty.pt"))
    with pytest.raises(RecipeError, match=r"knows 80 classes, the data set has 2.*baseline\.pretrained=.*eighty\.pt"):
        _load_or_train.start(config, dataset, 0, "baseline")


@pytest.mark.parametrize("optimizer", ["AdamW", "MuSGD"])
def test_frozen_layers_stay_and_the_others_move(folder: Path, dataset: Dataset, tmp_path: Path, optimizer: str) -> None:
    model, _ = transfer.load_pretrained(folder / "eighty.pt", NAMES, seed=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = TrainSettings(epochs=1, batch=2, imgsz_px=64, optimizer=optimizer, lr0=1e-2, freeze=10)
    (tmp_path / "work").mkdir()
    after = trainer.train(model, dataset, settings, [], tmp_path / "work", "transfer").state_dict()
    frozen = {name for name in before if int(name.split(".")[1]) < 10}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not moved & frozen  # BatchNorm's statistics included
    assert {f"model.{i}.conv.weight" for i in (16, 19)} <= moved and outputs(model) & moved
