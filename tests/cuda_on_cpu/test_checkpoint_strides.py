"""On CUDA, training is channels_last. Checkpoints and trained models still have the strides of new tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support.small_training import as_on_cuda, model, settings, small_set
from yolo_compress.train import checkpoint, trainer


def other_strides(net: nn.Module) -> list[str]:
    """Return names of tensors with other strides than a new tensor. `is_contiguous` misses those of 1x1 convolutions."""
    return [name for name, t in net.state_dict().items() if t.stride() != torch.empty(t.shape).stride()]


def fused_as_in_8_3(net: nn.Module) -> None:
    """Run the line of `fuse_conv_and_bn` in Ultralytics 8.3.203 that fails on channels_last."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.view(module.out_channels, -1)


DEVICES = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], ids=["channels_last on a CPU", "cuda"]
)


@DEVICES
def test_a_checkpoint_of_a_channels_last_model_fuses_in_older_versions(device: str, tmp_path: Path) -> None:
    net = model().to(device, memory_format=torch.channels_last)
    assert other_strides(net), "the model is channels_last, as after training on CUDA"
    expected = {name: tensor.cpu().clone() for name, tensor in net.state_dict().items()}
    checkpoint.save_model(net, tmp_path / "model.pt")
    assert other_strides(net), "saving does not change the model"
    loaded = checkpoint.load_model(tmp_path / "model.pt")
    assert other_strides(loaded) == []
    fused_as_in_8_3(loaded)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


@DEVICES
def test_a_training_in_channels_last_returns_the_strides_of_a_new_model(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cpu":
        as_on_cuda(monkeypatch)
    seen = []

    def look(hooked: trainer.HookedTrainer) -> None:
        seen.append(other_strides(hooked.model))

    monkeypatch.setattr(trainer.HookedTrainer, "_on_train_start", look)
    dataset = small_set(tmp_path / "set")
    chosen = settings(epochs=1, device="cpu" if device == "cpu" else "0")
    trained = trainer.train(model(), dataset, chosen, [], tmp_path / "work", "t")
    assert seen[0], "the training is channels_last"
    assert other_strides(trained) == []
