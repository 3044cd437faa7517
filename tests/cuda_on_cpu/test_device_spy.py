"""Outside of trainings, too, every model of a stage computes on `run.device`."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from ultralytics.nn.tasks import DetectionModel

from tests.pipeline.conftest import NAMES, prepare
from tests.support.noise_set import draw
from yolo_compress import pipeline, preflight
from yolo_compress.evaluate.torch_backend import TorchBackend
from yolo_compress.quant import sensitivity
from yolo_compress.stages import bench
from yolo_compress.train import checkpoint, trainer
from yolo_compress.train.together import Training

INDEX = "1"  # run.device
GPU = f"cuda:{INDEX}"


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
        forward, backend, train = DetectionModel.forward, TorchBackend.__init__, trainer._run

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

        def trained(training: Training) -> nn.Module:
            assert training.settings.device == INDEX
            return train(replace(training, settings=replace(training.settings, device="cpu")))

        patch.setattr(torch.cuda, "device_count", lambda: 2)
        patch.setattr(trainer, "_run", trained)
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
        patch.setattr(pipeline, "check", aside(preflight.check))
        patch.setattr(DetectionModel, "forward", looked_at)
        patch.setattr(TorchBackend, "__init__", opened)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spy]:
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        yield Spy(patch)
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.slow
@pytest.mark.parametrize("device", [INDEX, pytest.param("0", marks=pytest.mark.gpu)], ids=["spy", "cuda"])
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
    device: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = {"yaml": "shapes.yaml", "imgsz": 64, "limit_train": 8, "limit_val": 8}
    folder = prepare(tmp_path / "user", data=few, export=None, engine=None, bench=None, report=None, **sections)
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
    if device == "0":  # a tensor on another device fails by itself
        torch.cuda.reset_peak_memory_stats()
        folder.run(stage, "recipe=tiny.yaml", "run.device=0")
        assert torch.cuda.max_memory_allocated() > 0
        return
    spy: Spy = request.getfixturevalue("spy")
    folder.run(stage, "recipe=tiny.yaml", f"run.device={INDEX}")
    assert spy.right > 5
    assert not spy.wrong


def test_rows_of_torch_are_measured_on_the_device_and_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both the accuracy and the latency, which another process measures."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU of {device}")
    monkeypatch.setattr(bench, "_torch", lambda path: nn.Conv2d(3, 4, 1))
    opened: list[str] = []
    monkeypatch.setattr(bench, "TorchBackend", lambda module, names, imgsz, device="cpu": opened.append(device))
    timed: list[Any] = []

    def measured(specs: list[Any], rounds: int, n: int, progress: Any) -> list[dict[str, Any]]:
        timed.extend(specs)
        return [{"samples_ms": [1.0] * n, "rounds_ms": [[1.0] * n], "quiet": True, "threads": None} for _ in specs]

    monkeypatch.setattr(bench, "measure_in_turn", measured)
    draw(tmp_path / "images", 1)
    model = SimpleNamespace(
        stage="distill",
        metrics={"parameters": 1, "compute_gflops": 1.0},
        file=lambda name: tmp_path / "images" / "0.png",
    )
    engines = tmp_path / "engines.json"
    engines.write_text("[]")
    job: Any = SimpleNamespace(
        config=SimpleNamespace(threads=None, warmup=1, iterations=2, rounds=1),
        recipe=SimpleNamespace(run=SimpleNamespace(device=INDEX), export=None),
        dataset=SimpleNamespace(names=("a",), val=[SimpleNamespace(image=tmp_path / "images" / "0.png")]),
        imgsz_hw=(32, 32), work=tmp_path, out=tmp_path,
        inputs={"baseline": model, "distill": model, "engine": SimpleNamespace(file=lambda name: engines)},
    )  # fmt: skip
    candidates = bench._candidates(job)
    assert [one.subject["gpu"] for one in candidates] == [f"GPU of {GPU}"] * 2
    bench._open(job, candidates[0])
    bench._latency(job, candidates)
    assert opened == [GPU]
    assert [spec["device"] for spec in timed] == [GPU] * 2
    job.recipe.run.device = "cpu"
    assert all("gpu" not in one.subject for one in bench._candidates(job))
