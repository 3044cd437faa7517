"""The training loop: hooks in order, our images, a step a batch, exact resume, stock checkpoints."""

from __future__ import annotations

import csv
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from ultralytics.cfg import get_cfg
from ultralytics.data.dataset import YOLODataset

from tests.support.noise_set import noise_set
from yolo_compress.data.dataset import Dataset, load
from yolo_compress.errors import CorruptArtifact, EnvironmentLacks, NumericsError, RecipeError
from yolo_compress.train import checkpoint, trainer
from yolo_compress.train import dataset as train_dataset
from yolo_compress.train import trainer as train_trainer
from yolo_compress.train.dataset import EpochSampler, PreflightDataset, seed_everything
from yolo_compress.train.hook import TrainHook
from yolo_compress.train.settings import TrainSettings
from yolo_compress.train.trainer import HookedTrainer

NAMES = ["bolt", "nut"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return load(str(noise_set(tmp_path_factory.mktemp("set"), train=6, val=2)))


def settings(**changes: object) -> TrainSettings:
    usual = {"epochs": 2, "batch": 3, "imgsz_px": 64, "optimizer": "AdamW", "lr0": 1e-3}
    return TrainSettings(**{**usual, **changes})  # type: ignore[arg-type]


def model(seed: int = 0) -> nn.Module:
    return checkpoint.new_model("yolov8n.yaml", NAMES, 3, seed)


class Spy(TrainHook):
    """Writes down who was called; has an aligner of its own and a loss that needs it."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.extra = nn.ModuleDict({"probe": nn.Linear(1, 1)})

    def on_model(self, model: nn.Module) -> None:
        self.calls.append("on_model")

    def modules(self) -> nn.ModuleDict:
        return self.extra

    def on_epoch_start(self, epoch: int, epochs: int) -> None:
        self.calls.append(f"start {epoch}/{epochs}")

    def extra_loss(self, batch, predictions):
        if not isinstance(predictions, dict):
            return {}
        self.calls.append("loss")
        return {"spy": self.extra["probe"](batch["img"].mean().view(1)).square().squeeze()}

    def before_step(self, model: nn.Module) -> None:
        assert self.extra["probe"].weight.grad is not None
        self.calls.append("step")

    def on_epoch_end(self, epoch: int, model: nn.Module) -> dict[str, float]:
        self.calls.append(f"end {epoch}")
        return {"spy_figure": float(epoch)}

    def on_end(self, model: nn.Module) -> None:
        self.calls.append("on_end")

    def to_stock(self, model: nn.Module) -> None:
        self.calls.append("to_stock")


def test_hooks_are_called_in_the_order_of_the_docstring(dataset: Dataset, tmp_path: Path) -> None:
    spy = Spy()
    before = spy.extra["probe"].weight.detach().clone()
    trained = train_trainer.train(model(), dataset, settings(), [spy], tmp_path, "t")
    epoch = ["loss", "step"] * 2  # six images, batches of three, an optimizer step for every batch
    assert spy.calls == ["on_model", "start 0/2", *epoch, "end 0", "start 1/2", *epoch, "end 1", "on_end", "to_stock"]
    assert not torch.equal(before, spy.extra["probe"].weight), "a hook's modules are trained"
    assert not [name for name in trained.state_dict() if "probe" in name], "and never reach the checkpoint"
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2"] and all(float(row["train/spy"]) > 0 for row in rows)
    assert [row["spy_figure"] for row in rows] == ["0", "1"]
    assert rows[0]["metrics/mAP50-95(B)"] == "" and rows[1]["metrics/mAP50-95(B)"] != ""


@pytest.mark.parametrize("capability", ["amx_bf16", "avx512_bf16"])
def test_mixed_precision_on_a_cpu_that_multiplies_bfloat16(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: str
) -> None:
    """bfloat16 inside, float32 in what is kept; on other CPUs, and where it is not wanted, nothing changes."""
    seen: list[torch.dtype] = []

    class Look(TrainHook):
        def extra_loss(self, batch, predictions):
            if isinstance(predictions, dict):
                seen.append(predictions["scores"].dtype)
            return {}

    def trained(amp: bool, capable: bool) -> tuple[nn.Module, float]:
        seen.clear()
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {capability: True} if capable else {"avx2": True})
        work = tmp_path / f"{amp}-{capable}"
        net = train_trainer.train(model(), dataset, settings(epochs=1, amp=amp), [Look()], work, "t")
        (row,) = csv.DictReader((work / "results.csv").read_text().splitlines())
        return net, sum(float(row[f"train/{name}_loss"]) for name in ("box", "cls", "dfl"))

    plain, loss = trained(amp=False, capable=True)
    assert set(seen) == {torch.float32}
    other, same_loss = trained(amp=True, capable=False)
    assert set(seen) == {torch.float32} and same_loss == loss
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), plain.parameters(), strict=True))
    mixed, near_loss = trained(amp=True, capable=True)
    assert set(seen) == {torch.bfloat16}
    assert {tensor.dtype for tensor in mixed.parameters()} == {torch.float32}
    assert near_loss != loss and near_loss == pytest.approx(loss, rel=0.1)


def test_a_hook_scales_the_rate_of_the_parameters_it_names_through_the_whole_schedule(
    dataset: Dataset, tmp_path: Path
) -> None:
    seen: list[dict[str, float]] = []

    class Fast(Spy):
        def rates(self, model: nn.Module) -> dict[str, float]:
            return {"model.0.bn.weight": 10.0, "model.1.conv.weight": 0.5}

    trainer = HookedTrainer(model(), dataset, settings(), [Fast()], tmp_path, "t")

    def look(trainer: HookedTrainer) -> None:
        rate = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
        assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(rate)
        seen.append({name: rate[id(p)] for name, p in trainer.model.named_parameters()})

    trainer.add_callback("on_train_batch_end", look)
    trainer.train()
    trainer.close()
    for rates in seen:
        assert rates["model.0.bn.weight"] == pytest.approx(10 * rates["model.0.bn.bias"])
        assert rates["model.1.conv.weight"] == pytest.approx(0.5 * rates["model.0.conv.weight"])
        assert rates["model.1.bn.weight"] == rates["model.0.conv.weight"]
    assert seen[-1]["model.0.conv.weight"] < seen[0]["model.0.conv.weight"]


class _Stop(Exception):
    pass


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Raise right after the state of epoch `[0]` was saved."""
    when = [-1]
    whole = HookedTrainer.save_model

    def save_model(self: HookedTrainer) -> bool:
        saved = whole(self)
        if self.epoch == when[0]:
            raise _Stop
        return saved

    monkeypatch.setattr(HookedTrainer, "save_model", save_model)
    yield when


@pytest.mark.fault(43)
@pytest.mark.slow
def test_resumed_equals_uninterrupted(dataset: Dataset, tmp_path: Path, stop_after: list[int]) -> None:
    def run(work: Path) -> tuple[dict, str]:
        work.mkdir(exist_ok=True)
        torch.manual_seed(7)
        hook = Spy()
        trained = train_trainer.train(
            model(), dataset, settings(epochs=4, warmup_epochs=1.0, close_mosaic=1), [hook], work, "t"
        )
        return trained.state_dict() | hook.extra.state_dict(), (work / "results.csv").read_text()

    whole, rows = run(tmp_path / "whole")
    for epoch in (0, 2, 3):
        stop_after[0] = epoch
        with pytest.raises(_Stop):
            run(tmp_path / "killed")
    stop_after[0] = -1
    resumed, resumed_rows = run(tmp_path / "killed")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert rows == resumed_rows


@pytest.mark.fault(59)
def test_results_csv_holds_each_epoch_once_after_a_kill(
    dataset: Dataset, tmp_path: Path, stop_after: list[int]
) -> None:
    """A half line, an epoch that was not saved, an epoch twice: the rows of the saved epochs take their place."""
    stop_after[0] = 0
    with pytest.raises(_Stop):
        train_trainer.train(model(), dataset, settings(batch=6), [], tmp_path, "t")
    file = tmp_path / "results.csv"
    file.write_text(file.read_text() * 2 + "2,0.5,9.9\n3,0.")
    train_trainer.train(model(), dataset, settings(batch=6), [], tmp_path, "t")
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert all(float(row["train/box_loss"]) > 0 and None not in row for row in rows)


class Breaks(TrainHook):
    """A loss of its own that is `value` from the batch `number` on; counts the steps of the optimizer."""

    def __init__(self, number: int, value: float = 1.0) -> None:
        self.number, self.value, self.batches, self.images, self.steps = number, value, 0, [], 0

    def extra_loss(self, batch, predictions):
        if not isinstance(predictions, dict):
            return {}
        self.images.append([Path(name).name for name in batch["im_file"]])
        self.batches += 1
        return {"kd": batch["img"].mean() * (self.value if self.batches >= self.number else 1.0)}

    def before_step(self, model: nn.Module) -> None:
        self.steps += 1


@pytest.mark.fault(37)
@pytest.mark.parametrize(
    ("number", "value", "kept"),
    [
        (2, float("nan"), "epoch 1; no epoch was completed"),
        (3, float("inf"), "epoch 2; the state after epoch 1 is kept"),
    ],
)
def test_a_loss_that_is_not_finite_names_its_images(
    dataset: Dataset, tmp_path: Path, number: int, value: float, kept: str
) -> None:
    hook = Breaks(number, value)
    with pytest.raises(
        NumericsError, match=rf"t: kd became NaN or infinite in {kept}\. Lower lr0 .*bad_batch"
    ) as caught:
        train_trainer.train(model(), dataset, settings(batch=4), [hook], tmp_path, "t")
    assert caught.value.exit_code == 7
    assert len(hook.images) == number, "the run stops at that batch"
    bad = [Path(line).name for line in (tmp_path / "bad_batch.txt").read_text().splitlines()]
    assert bad == hook.images[-1] and ", ".join(bad[:3]) in str(caught.value)
    assert ("and 1 more, listed" in str(caught.value)) == (len(bad) == 4)
    assert (tmp_path / "resume.pt").exists() == (number == 3)


class PoisonsLastStep(TrainHook):
    """Makes a weight NaN after the last batch of an epoch, whose loss was finite, as an infinite gradient does."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_epoch_end(self, epoch: int, model: nn.Module) -> dict[str, float]:
        if epoch == self.epoch:
            next(model.parameters()).data.flatten()[0] = float("nan")
        return {}


@pytest.mark.fault(37)
def test_weights_that_are_not_finite_are_not_saved(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match=r"^t: after epoch 2: model\.0\.conv\.weight holds NaN"):
        train_trainer.train(model(), dataset, settings(batch=4), [PoisonsLastStep(1)], tmp_path, "t")
    saved = torch.load(tmp_path / "resume.pt", weights_only=False)
    assert saved["epoch"] == 0 and all(tensor.isfinite().all() for tensor in saved["model"].values())


class Full(TrainHook):
    """A device that has memory for so many images."""

    def __init__(self, fits: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fits, self.seen, self.steps = fits, [], 0
        whole = trainer._HookedCriterion.__call__

        def limited(criterion, predictions, batch):
            self.seen.append(len(batch["img"]))
            if len(batch["img"]) > fits:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return whole(criterion, predictions, batch)

        monkeypatch.setattr(trainer._HookedCriterion, "__call__", limited)

    def before_step(self, model: nn.Module) -> None:
        self.steps += 1


@pytest.mark.fault(51)
@pytest.mark.parametrize("fits", [0, 2])
def test_memory_that_does_not_suffice_is_an_error_and_no_smaller_batch(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: int
) -> None:
    full = Full(fits, monkeypatch)
    with pytest.raises(EnvironmentLacks, match=r"t: out of memory at batch 6 and imgsz 64: lower t.batch or") as caught:
        train_trainer.train(model(), dataset, settings(batch=6), [full], tmp_path, "t")
    assert caught.value.exit_code == 4 and full.seen == [6] and full.steps == 0


@pytest.mark.fault(52)
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["killed", "hangs"])
def test_a_data_worker_that_is_lost_ends_the_run(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Ultralytics sets no workers on a CPU; here the loader gets one all the same."""
    main, make, read = os.getpid(), HookedTrainer.get_dataloader, PreflightDataset.__getitem__

    def with_worker(self: HookedTrainer, path: str, batch_size: int = 16, rank: int = 0, mode: str = "train"):
        self.args.workers = int(mode == "train")
        return make(self, path, batch_size, rank, mode)

    def lost(self: PreflightDataset, index: int):
        if os.getpid() != main:
            os.kill(os.getpid(), signal.SIGKILL) if kind == "killed" else time.sleep(60)
        return read(self, index)

    if kind == "hangs":  # a worker that was killed is noticed at once
        monkeypatch.setattr(trainer, "WORKER_PATIENCE_S", 1.0)
    monkeypatch.setattr(HookedTrainer, "get_dataloader", with_worker)
    monkeypatch.setattr(PreflightDataset, "__getitem__", lost)
    started = time.monotonic()
    with pytest.raises(
        EnvironmentLacks, match=r"t: a data worker ended or hangs \(DataLoader .*run\.workers"
    ) as caught:
        train_trainer.train(model(), dataset, settings(), [], tmp_path, "t")
    assert caught.value.exit_code == 4 and time.monotonic() - started < 30


def test_a_resume_file_of_another_net_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    torch.save({"epoch": 0, "model": {}}, tmp_path / "resume.pt")
    with pytest.raises(CorruptArtifact, match="cannot be continued"):
        train_trainer.train(model(), dataset, settings(), [], tmp_path, "t")


def test_order_is_a_function_of_seed_and_epoch() -> None:
    sampler, other = EpochSampler(10, 3), EpochSampler(10, 3)
    first, second = list(sampler), list(sampler)
    other.next_epoch = 1
    assert sorted(first) == list(range(10)) and first != second == list(other)
    assert list(EpochSampler(10, 4)) != first


def test_ranks_share_an_epoch_without_overlap() -> None:
    parts = [list(EpochSampler(10, 0, rank=rank, world=2)) for rank in (0, 1)]
    assert sorted(parts[0] + parts[1]) == list(range(10))
    assert {len(list(EpochSampler(9, 0, rank=rank, world=2))) for rank in (0, 1)} == {5}


@pytest.mark.fault(19, 54)
def test_labels_are_those_of_the_preflight_and_no_cache_is_written(dataset: Dataset) -> None:
    from ultralytics.cfg import get_cfg

    data = {"names": dict(enumerate(NAMES)), "channels": 3}
    built = PreflightDataset(dataset.val, cache=False, imgsz=64, augment=False, hyp=get_cfg(), batch_size=2, data=data)
    assert [tuple(label["bboxes"][0]) for label in built.labels] == [pytest.approx((0.5, 0.5, 0.4, 0.4))] * 2
    assert [int(label["cls"][0, 0]) for label in built.labels] == [0, 1]
    assert not list(dataset.val[0].image.parents[2].rglob("*.cache"))


class _Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.marker,)


@pytest.mark.fault(19)
@pytest.mark.parametrize("content", ["another version", "another set", "malicious", "no array"])
def test_a_labels_cache_of_ultralytics_is_not_read(tmp_path: Path, content: str) -> None:
    """It lies where Ultralytics would read it, as a pickle."""
    from ultralytics.cfg import get_cfg

    dataset = load(str(noise_set(tmp_path / "set", train=2, val=1)))
    cache, marker = tmp_path / "set/labels/train.cache", tmp_path / "ran"
    known = {
        "version": "0" if content == "another version" else "1.0.3",
        "labels": [],
        "hash": "0",
        "results": (0,) * 5,
    }
    with cache.open("wb") as file:
        if content == "no array":
            file.write(b"PK\x03\x04")
        else:
            np.save(file, np.array(_Evil(marker) if content == "malicious" else known, dtype=object))
    before = cache.read_bytes()
    assert load(str(tmp_path / "set/set.yaml")).digest == dataset.digest
    data = {"names": dict(enumerate(NAMES)), "channels": 3}
    built = PreflightDataset(
        dataset.train, cache=False, imgsz=64, augment=False, hyp=get_cfg(), batch_size=2, data=data
    )
    assert [int(label["cls"][0, 0]) for label in built.labels] == [0, 1]
    assert not marker.exists() and cache.read_bytes() == before


def test_augmentation_is_a_function_of_seed_and_epoch(dataset: Dataset) -> None:
    from ultralytics.cfg import get_cfg

    data = {"names": dict(enumerate(NAMES)), "channels": 3}

    def image(epoch: int) -> torch.Tensor:
        built = PreflightDataset(
            dataset.train, cache=True, imgsz=64, augment=True, hyp=get_cfg(), batch_size=2, data=data
        )
        seed_everything(0, epoch)
        return built[0]["img"]

    assert torch.equal(image(1), image(1)) and not torch.equal(image(1), image(2))


def test_checkpoint_round_trip_is_exact_and_anonymous(tmp_path: Path) -> None:
    net = model(3)
    checkpoint.save_model(net, tmp_path / "m.pt")
    again = checkpoint.load_model(tmp_path / "m.pt")
    assert all(torch.equal(net.state_dict()[key], value) for key, value in again.state_dict().items())
    content = (tmp_path / "m.pt").read_bytes()
    assert str(tmp_path).encode() not in content and b"git" not in content
    checkpoint.save_model(net, tmp_path / "again.pt")
    assert (tmp_path / "again.pt").read_bytes() == content, "same net, same bytes"


def test_new_models_are_equal_for_equal_seeds() -> None:
    first, second, other = model(1), model(1), model(2)
    assert torch.equal(first.model[0].conv.weight, second.model[0].conv.weight)
    assert not torch.equal(first.model[0].conv.weight, other.model[0].conv.weight)


def test_class_differences_are_named() -> None:
    with pytest.raises(RecipeError, match="1: nut in the model, washer in the data"):
        checkpoint.check_classes(model(), ["bolt", "washer"], "baseline.weights=x.pt")


def test_decoded_images_serve_all_trainings_of_a_command(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second training with images of the same size decodes none, and the pixels are those of one thread."""
    args = get_cfg(overrides={"task": "detect", "mode": "train", "imgsz": 64})
    data = {"nc": len(dataset.names), "channels": 3}
    read, count = YOLODataset.load_image, [0]

    def counted(self: YOLODataset, i: int, **kwargs: Any) -> Any:
        count[0] += self.ims[i] is None
        return read(self, i, **kwargs)

    def images(imgsz_px: int, cores: int) -> list[np.ndarray]:
        monkeypatch.setattr(train_dataset, "usable_cpus", lambda: cores)
        made = PreflightDataset(dataset.train, cache=True, imgsz=imgsz_px, augment=True, hyp=args, data=data)
        found = [made.load_image(i)[0] for i in range(len(made))]
        found[0][:] = 0  # as an augmentation in place
        return found[1:]

    monkeypatch.setattr(YOLODataset, "load_image", counted)
    train_dataset._decoded.clear()
    first = images(64, 3)
    assert count[0] == len(dataset.train)
    assert all(map(np.array_equal, first, images(64, 1))) and count[0] == len(dataset.train)
    images(32, 1)
    assert count[0] == 2 * len(dataset.train), "another size"
    assert all(map(np.array_equal, first, images(64, 1))) and count[0] == 3 * len(dataset.train), "one set is kept"


def test_workers_that_a_cpu_does_not_use_are_said(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for workers in (0, 4):
        trainer = HookedTrainer(model(), dataset, settings(epochs=1, workers=workers), [], tmp_path / str(workers), "t")
        trainer.close()
        said = "run.workers=4 has no effect on a CPU" in capsys.readouterr().err
        assert said == bool(workers)


def test_no_epochs_means_hooks_only(dataset: Dataset, tmp_path: Path) -> None:
    spy = Spy()
    net = model()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    trained = train_trainer.train(net, dataset, settings(epochs=0), [spy], tmp_path, "t")
    assert spy.calls == ["on_model", "on_end", "to_stock"]
    assert all(torch.equal(before[key], value) for key, value in trained.state_dict().items())


def test_a_checkpoint_does_not_remember_which_images_the_net_has_seen(tmp_path: Path) -> None:
    """Nor whether it was trained in this process: a run that was killed after its last epoch is not, and ends with the same file."""
    net = checkpoint.new_model("yolov8n.yaml", NAMES, 3, 0).eval()
    checkpoint.save_model(net, tmp_path / "before.pt")
    net.end2end = False  # as Ultralytics' validator does
    net.stride = net.stride.clone()  # as its EMA does
    with torch.no_grad():
        net(torch.zeros(1, 3, 64, 96))
    checkpoint.save_model(net, tmp_path / "after.pt")
    before, after = (torch.load(tmp_path / f"{name}.pt", weights_only=False)["model"] for name in ("before", "after"))
    assert vars(before.model[-1]).keys() == vars(after.model[-1]).keys()
    assert (tmp_path / "before.pt").stat().st_size == (tmp_path / "after.pt").stat().st_size
    assert torch.isfinite(checkpoint.load_model(tmp_path / "after.pt")(torch.zeros(1, 3, 64, 64))[0]).all()
