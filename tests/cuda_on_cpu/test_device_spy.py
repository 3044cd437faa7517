"""Outside of trainings, too, every model of a stage computes on `run.device`."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from ultralytics.nn.tasks import DetectionModel

from tests.pipeline.conftest import NAMES, prepare
from yolo_compress import pipeline
from yolo_compress.evaluate.torch_backend import TorchBackend
from yolo_compress.quant import sensitivity
from yolo_compress.stages import _training, bench
from yolo_compress.train import checkpoint, trainer

GPU = "cuda:0"


class Spy:
    """Patch `to` so that it marks a model with its device instead of moving it, and count forward passes by device.

    Attributes:
        wrong: Number of forward passes on other devices than the GPU, by device.
        right: Number of forward passes on the GPU.
        trains: True while forward passes are not counted.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.wrong: Counter[str] = Counter()
        self.right = 0
        self.trains = False
        to, cpu, tensor_to = nn.Module.to, nn.Module.cpu, torch.Tensor.to
        forward, backend = DetectionModel.forward, TorchBackend.__init__

        def marked(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
            rest = [a for a in args if not isinstance(a, torch.device | str)]
            for where in (a for a in args if isinstance(a, torch.device | str)):
                for part in module.modules():
                    part.__dict__["spied"] = str(where)
            return to(module, *rest, **kwargs) if rest or kwargs else module

        def home(module: nn.Module) -> nn.Module:
            return cpu(marked(module, "cpu"))

        def kept(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            args = tuple(a for a in args if not (isinstance(a, torch.device | str) and str(a).startswith("cuda")))
            return tensor_to(tensor, *args, **kwargs) if args or kwargs else tensor

        def aside(function: Any) -> Any:
            """Wrap a function whose forward passes are not counted: a training sets its own device, a loader checks on the CPU."""

            def called(*args: Any, **kwargs: Any) -> Any:
                before, self.trains = self.trains, True
                try:
                    return function(*args, **kwargs)
                finally:
                    self.trains = before

            return called

        def looked_at(module: nn.Module, x: Any, *args: Any, **kwargs: Any) -> Any:
            on_meta = isinstance(x, torch.Tensor) and x.device.type == "meta"
            if not self.trains and not on_meta:
                where = module.__dict__.get("spied", "nowhere")
                self.right += where == GPU
                if where != GPU:
                    self.wrong[where] += 1
            return forward(module, x, *args, **kwargs)

        def opened(
            self_: TorchBackend, module: nn.Module, names: Any, imgsz: Any, device: str = "cpu", **more: Any
        ) -> None:
            backend(self_, marked(module, device), names, imgsz, "cpu", **more)

        patch.setattr(nn.Module, "to", marked)
        patch.setattr(nn.Module, "cpu", home)
        patch.setattr(torch.Tensor, "to", kept)
        for module, name in (
            (trainer, "_run"),
            (trainer, "_untrained"),
            (checkpoint, "load_model"),
            (checkpoint, "new_model"),
        ):
            patch.setattr(module, name, aside(getattr(module, name)))
        patch.setattr(pipeline, "check", aside(pipeline.check))
        patch.setattr(DetectionModel, "forward", looked_at)
        patch.setattr(TorchBackend, "__init__", opened)
        for stage in (_training, bench):
            patch.setattr(stage, "device", lambda job: GPU)
        for name in ("_model_score", "_prune_plan"):
            patch.setattr(f"yolo_compress.stages.{name}.device", lambda job: GPU)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spy]:
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        yield Spy(patch)
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "sections"),
    [
        ("prune", {"sparsify": None, "prune": {"epochs": 2, "batch": 8, "keep_flops": 0.7, "calib_images": 4, "rounds": 2,
                                               "criterion": "taylor"}}),
        ("qat", {"sparsify": None, "prune": None, "distill": None,
                 "qat": {"epochs": 0, "calib_images": 4, "sensitivity": "loss", "max_drop": 0.5}}),
        ("distill", {"sparsify": None, "prune": None, "teacher": {"weights": "other.pt"},
                     "distill": {"epochs": 1, "batch": 8, "data_free": 4,
                                                                  "data_free_steps": 2}}),
    ],
    ids=["rounds", "sensitivity by loss", "inversion"],
)  # fmt: skip
def test_a_stage_computes_on_the_device_of_the_recipe(
    stage: str,
    sections: dict[str, Any],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = prepare(tmp_path / "user", export=None, engine=None, bench=None, report=None, **sections)
    checkpoint.save_model(checkpoint.new_model("yolov8n.yaml", NAMES, 3, 1), folder.folder / "weights" / "other.pt")
    folder.run("baseline", "recipe=tiny.yaml")
    measure = sensitivity.measure

    def two_groups(
        model: nn.Module, placed: Any, value: Any, done: dict[str, float], after_each: Any
    ) -> dict[str, float]:
        done |= {group.name: 0.0 for group in placed.int8[2:]}
        return measure(model, placed, value, done, after_each)

    monkeypatch.setattr(sensitivity, "measure", two_groups)
    monkeypatch.setattr(sensitivity, "choose", lambda *arguments: ((), 0.0))
    spy: Spy = request.getfixturevalue("spy")
    folder.run(stage, "recipe=tiny.yaml")
    assert spy.right > 5
    assert not spy.wrong


def test_rows_of_torch_are_measured_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "device", lambda job: GPU)
    monkeypatch.setattr(bench, "_torch", lambda row: nn.Conv2d(3, 4, 1))
    opened: list[str] = []
    monkeypatch.setattr(bench, "TorchBackend", lambda module, names, imgsz, device="cpu": opened.append(device))
    job: Any = type("Job", (), {"config": None, "dataset": type("D", (), {"names": ("a",)}), "imgsz_hw": (32, 32)})
    subject: Any = {"model": "original", "runtime": "torch", "precision": "fp32"}
    bench._open(job, bench._Candidate(subject, path="x"))
    assert opened == [GPU]
