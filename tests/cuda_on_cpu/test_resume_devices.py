"""A run continues on another device. A damaged resume file is refused."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.support import quant_net
from tests.support.small_training import Stopped, as_on_cuda, model, settings, small_set, stop_after_save
from yolo_compress.data.dataset import Dataset
from yolo_compress.errors import CorruptArtifact
from yolo_compress.quant.calibrate import ptq
from yolo_compress.quant.fakequant import FakeQuant
from yolo_compress.train import trainer
from yolo_compress.train.checkpoint import dress
from yolo_compress.train.trainer import HookedTrainer


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return small_set(tmp_path_factory.mktemp("set"))


def run(dataset: Dataset, work: Path, *, device: str = "cpu", stop: bool, epochs: int = 2) -> None:
    """Train on the CPU, on GPU "0", or "as on CUDA" on the CPU. `stop` kills the training after its first epoch."""
    with pytest.MonkeyPatch.context() as patch:
        if device == "as on CUDA":
            as_on_cuda(patch)
        chosen = settings(epochs=epochs, device="0" if device == "0" else "cpu")
        if stop:
            stop_after_save(patch)
            with pytest.raises(Stopped):
                trainer.train(model(), dataset, chosen, [], work, "t")
        else:
            trainer.train(model(), dataset, chosen, [], work, "t")


@pytest.fixture(scope="module")
def saved(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The `resume.pt` of a training of two epochs that was killed after the first."""
    work = tmp_path_factory.mktemp("stopped")
    run(dataset, work, stop=True)
    return (work / "resume.pt").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["as on CUDA", pytest.param("0", marks=pytest.mark.gpu)])
def test_from_the_cpu_to_a_gpu_and_back(gpu: str, dataset: Dataset, tmp_path: Path) -> None:
    run(dataset, tmp_path, stop=True, epochs=3)
    assert torch.load(tmp_path / "resume.pt", weights_only=True)["scaler"] == {}
    run(dataset, tmp_path, device=gpu, stop=True, epochs=3)
    state = torch.load(tmp_path / "resume.pt", weights_only=True)
    assert state["epoch"] == 1 and state["scaler"]["scale"] > 0
    run(dataset, tmp_path, stop=False, epochs=3)
    state = torch.load(tmp_path / "resume.pt", weights_only=True)
    assert state["epoch"] == 2 and state["scaler"] == {}


def test_the_kernel_of_the_optimizer_is_that_of_this_device(dataset: Dataset, saved: bytes, tmp_path: Path) -> None:
    """CUDA saves `fused: True`. Another device uses its own value. What was read does not stay in memory."""
    state = torch.load(io.BytesIO(saved), weights_only=True)
    for group in state["optimizer"]["param_groups"]:
        group["fused"] = True
    torch.save(state, tmp_path / "resume.pt")
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            HookedTrainer,
            "_on_train_start",
            lambda t: seen.extend([t._saved, *(g.get("fused") for g in t.optimizer.param_groups)]),
        )
        run(dataset, tmp_path, stop=True)
    assert seen and not any(seen)


@pytest.mark.parametrize("damage", ["half", "empty", "one byte", "another run", "finished"])
def test_a_damaged_resume_file_is_one_line_that_says_what_to_do(
    damage: str, dataset: Dataset, saved: bytes, tmp_path: Path
) -> None:
    work = tmp_path / "sparsify-1.partial" / "work"
    work.mkdir(parents=True)
    file = work / "resume.pt"
    file.write_bytes(saved)
    if damage == "another run":
        state = torch.load(file, weights_only=True)
        state["optimizer"]["param_groups"] = state["optimizer"]["param_groups"][:1]
        torch.save(state, file)
    elif damage == "finished":  # the last epoch is saved, so Ultralytics' loop does not run
        state = torch.load(file, weights_only=True)
        torch.save({"epoch": 1, "model": state["model"]}, file)
    else:
        file.write_bytes({"half": saved[: len(saved) // 2], "empty": b"", "one byte": b"\x80"}[damage])
    with pytest.raises(CorruptArtifact) as caught:
        trainer.train(model(), dataset, settings(), [], work, "t")
    message = str(caught.value)
    assert message.startswith(f"{file}: cannot be continued (") and "\n" not in message
    assert message.endswith(f"; delete {work.parent} to start this stage again")


def test_learned_ranges_get_no_weight_decay(tmp_path: Path) -> None:
    dataset, net = small_set(tmp_path / "set", names=quant_net.NAMES), dress(quant_net.net(), quant_net.NAMES)
    calibrate = partial(ptq, batches=lambda: [quant_net.images(2)])
    hook = FakeQuant(calibrate, calibrate(net), learned=True)
    hooked = HookedTrainer(net, dataset, settings(epochs=1, weight_decay=0.1), [hook], tmp_path, "t")
    hooked._setup_train()
    hooked.close()
    decay = {id(p): group["weight_decay"] for group in hooked.optimizer.param_groups for p in group["params"]}
    named = dict(hooked.model.named_parameters())
    assert sum(len(group["params"]) for group in hooked.optimizer.param_groups) == len(decay) == len(named)
    ranges = [name for name in named if "log_amax" in name]
    assert len(ranges) > 50 and {decay[id(named[name])] for name in ranges} == {0.0}
    filters = [name for name, p in named.items() if p.dim() == 4 and "log_amax" not in name]
    assert all(decay[id(named[name])] == pytest.approx(0.1) for name in filters)
