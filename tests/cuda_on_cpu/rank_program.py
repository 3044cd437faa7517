"""Trainings of several ranks for `test_ranks.py`: `torchrun ... rank_program.py FOLDER [DEVICE]`. Each rank writes `rank-N.json`."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.support.small_training import model, settings
from yolo_compress.nets.hardening import harden

harden()

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from ultralytics.utils.torch_utils import unwrap_model  # noqa: E402

from yolo_compress import ranks  # noqa: E402
from yolo_compress.__main__ import end_process  # noqa: E402
from yolo_compress.data.dataset import Dataset, load  # noqa: E402
from yolo_compress.distill.hook import Teach  # noqa: E402
from yolo_compress.distill.teacher import Frozen, Peer  # noqa: E402
from yolo_compress.errors import CompressError  # noqa: E402
from yolo_compress.quant.calibrate import ptq  # noqa: E402
from yolo_compress.quant.fakequant import FakeQuant  # noqa: E402
from yolo_compress.train import together, trainer  # noqa: E402
from yolo_compress.train.hook import TrainHook  # noqa: E402
from yolo_compress.train.trainer import HookedTrainer  # noqa: E402

SEEN: dict[str, Any] = {}  # name of the training -> what this rank recorded, or the error that it raised
DEVICE = sys.argv[2] if len(sys.argv) > 2 else "cpu"


class Overflow(TrainHook):
    """A hook with an extra module whose gradient overflows, only at the first step of rank 0."""

    def __init__(self) -> None:
        self.extra = nn.ModuleDict({"probe": nn.Linear(1, 1)})
        self.steps = 0

    def modules(self) -> nn.ModuleDict:
        return self.extra

    def extra_loss(self, batch: Any, predictions: Any) -> dict[str, Tensor]:
        if not isinstance(predictions, dict):
            return {}
        self.steps += 1
        factor = 1e34 if ranks.rank() == 0 and self.steps == 1 else 1e-3
        return {"probe": self.extra["probe"].weight.abs().sum() * factor}


class LastRank(TrainHook):
    """A hook that harms the second step of the last rank: its loss is NaN, or its weights get another value."""

    def __init__(self, harm: str) -> None:
        self.harm = harm
        self.steps = 0

    def extra_loss(self, batch: Any, predictions: Any) -> dict[str, Tensor]:
        if not isinstance(predictions, dict):
            return {}
        self.steps += 1
        here = ranks.rank() == ranks.world() - 1 and self.steps == 2
        return {
            "harmed": predictions["scores"].float().mean() * (float("nan") if here and self.harm == "nan" else 0.01)
        }

    def before_step(self, model: nn.Module) -> None:
        if ranks.rank() == ranks.world() - 1 and self.harm == "drift":
            with torch.no_grad():
                next(model.parameters()).flatten()[0] += 1e-6


def digest(tensors: Iterable[Tensor]) -> str:
    return hashlib.sha256(b"".join(t.detach().cpu().contiguous().numpy().tobytes() for t in tensors)).hexdigest()[:12]


def spy() -> None:
    """Record steps, images, random draws and final tensors of each training in `SEEN`, on every rank."""
    run, step, batch = trainer._run, HookedTrainer.optimizer_step, HookedTrainer.preprocess_batch
    scaler = torch.amp.GradScaler

    def watched(training: together.Training) -> nn.Module:
        SEEN[training.what] = {"steps": [], "images": [], "drawn": [], "scales": []}
        if training.what == "overflow" and DEVICE == "cpu":
            torch.amp.GradScaler = lambda device, enabled: scaler("cpu", enabled=True)
        ema = run(training)
        torch.amp.GradScaler = scaler
        extras = [hook.modules() for hook in training.hooks]
        SEEN[training.what] |= {
            "parameters": digest(unwrap_model(training.model).parameters()),
            "buffers": digest(unwrap_model(training.model).buffers()),
            "extras": digest(t for extra in extras for t in [*extra.parameters(), *extra.buffers()]),
            "ema": digest(ema.parameters()),
        }
        return ema

    def stepped(hooked: HookedTrainer) -> None:
        step(hooked)
        seen = SEEN[hooked.what]
        seen["steps"].append(digest([*hooked.model.parameters(), *hooked._extra_parameters()]))
        seen["scales"].append(hooked.scaler.get_scale())

    def read(hooked: HookedTrainer, images: dict[str, Any]) -> dict[str, Any]:
        if hooked.model.training:
            SEEN[hooked.what]["images"] += [Path(name).name for name in images["im_file"]]
            SEEN[hooked.what]["drawn"].append(float(torch.rand(1)))
        return batch(hooked, images)

    trainer._run, HookedTrainer.optimizer_step, HookedTrainer.preprocess_batch = watched, stepped, read


def trainings(dataset: Dataset, folder: Path) -> None:
    """Run all trainings, on rank 0."""

    def train(what: str, hooks: list[TrainHook], **changes: Any) -> None:
        chosen = settings(**({"epochs": 1, "batch": 2 * ranks.world(), "mosaic": 0.0, "device": DEVICE} | changes))
        trainer.train(model(), dataset, chosen, hooks, folder / what.split()[0], what)

    train("plain", [], epochs=2, val_every=1)
    train("plain again", [], epochs=2, val_every=1)  # already finished: no step
    train("overflow", [Overflow()])
    train("mgd", [Teach(Frozen(model(1)), feature_weight=0.1, class_weight=0.0, feature_loss="mgd")])
    train("mutual", [Teach(Peer(model(1)), feature_weight=0.1, class_weight=0.5)])
    calibrate = partial(ptq, batches=partial(calibration, 2))
    train("qat", [FakeQuant(calibrate, calibrate(model()), learned=True)], amp=False)


def calibration(count: int) -> list[Tensor]:
    assert ranks.rank() == 0, "one rank calibrates"
    return [torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(0))]


def harmed(dataset: Dataset, folder: Path, harm: str) -> None:
    """Run a training that fails because of the last rank, on rank 0."""
    chosen = settings(epochs=1, batch=2 * ranks.world(), mosaic=0.0, device=DEVICE)
    trainer.train(model(), dataset, chosen, [LastRank(harm)], folder / harm, harm)


def together_run(run: Callable[[Dataset, Path], None], folder: Path) -> None:
    """Form a process group, in which rank 0 calls `run` and the others take part."""
    with together.formed(DEVICE, {"recipe": "the same"}):
        if ranks.rank() == 0:
            run(load(str(folder / "set" / "set.yaml")), folder)
            together.end("done")
        else:
            assert trainer.take_part(DEVICE, 0, 1) == "done"


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    spy()
    together_run(trainings, folder)
    for harm in ("nan", "drift"):  # after an error another group can be formed
        try:
            together_run(partial(harmed, harm=harm), folder)
        except CompressError as error:
            SEEN[harm] = [type(error).__name__, str(error)]
        assert not torch.distributed.is_initialized()
    (folder / f"rank-{ranks.rank()}.json").write_text(json.dumps(SEEN))


if __name__ == "__main__":
    sys.modules["rank_program"] = sys.modules["__main__"]
    main(Path(sys.argv[1]))
    end_process(0)
