"""float16 autocast as on CUDA: extra losses are computed in float32, and lack of memory is an error of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.small_training import model, settings, small_set
from yolo_compress.distill import feature
from yolo_compress.distill.feature import Aligner
from yolo_compress.distill.hook import Teach
from yolo_compress.distill.teacher import Frozen
from yolo_compress.errors import EnvironmentLacks
from yolo_compress.recipe import choices
from yolo_compress.train import trainer
from yolo_compress.train.hook import TrainHook

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", choices.FEATURE_LOSSES)
def test_a_feature_loss_under_float16_is_that_of_float32(name: str, device: str) -> None:
    """The maps have the size of P3 at 640 px. Their sum of squares per image is far above 65,504, the largest float16."""
    torch.manual_seed(0)
    teach = Teach(Frozen(model()), feature_weight=1.0, class_weight=0.0, feature_loss=name)
    teach.extras["0"] = feature.find(name).adapter(8, 8).to(device)
    own = (3 * torch.randn(2, 8, 80, 80, device=device)).half().requires_grad_()
    other = (3 * torch.randn(2, 8, 80, 80, device=device)).half()
    weight = torch.rand(2, 1, 80, 80, device=device)
    assert own.detach().float().square().flatten(1).sum(1).min() > 65_504

    def loss(half: bool) -> tuple[float, Tensor]:
        for part in teach.extras.modules():
            if isinstance(part, Aligner):
                part.started.fill_(True)  # the aligner is the identity in both
        torch.manual_seed(1)  # for the mask of MGD
        with torch.autocast(device, dtype=torch.float16, enabled=half):
            value = teach._features([own if half else own.float()], [other if half else other.float()], [weight])
        own.grad = None
        (value * 1024).backward()
        return float(value.detach()), own.grad.float()

    (single, expected), (half, gradient) = loss(half=False), loss(half=True)
    assert half == pytest.approx(single, rel=5e-3)
    assert bool(torch.isfinite(gradient).all()) and bool(gradient.any())
    assert float(nn.functional.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0)) > 0.99


@pytest.mark.parametrize("device", DEVICES)
def test_terms_of_the_head_do_not_see_autocast(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def spied(*arguments: Any) -> dict[str, Tensor]:
        seen.append(torch.is_autocast_enabled(device))
        return {"kd_class": torch.ones((), requires_grad=True)}

    monkeypatch.setattr("yolo_compress.distill.hook.head_terms", spied)
    teach = Teach(Frozen(model()), feature_weight=0.0, class_weight=1.0)
    scores = torch.zeros(1, 2, 4, device=device)
    with torch.autocast(device, dtype=torch.float16):
        teach._head_loss({"scores": scores}, {"scores": scores})
        assert torch.is_autocast_enabled(device)
    assert seen == [False]


class Largest(TorchDispatchMode):
    """Record the size in bytes of the largest float64 tensor created inside the block."""

    most = 0

    def __torch_dispatch__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.dtype == torch.float64:
            self.most = max(self.most, made.numel() * made.element_size())
        return made


@pytest.mark.parametrize("device", DEVICES)
def test_the_start_of_an_aligner_takes_bounded_memory_and_gives_the_same(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    own, other = torch.randn(8, 12, 16, 16, device=device), torch.randn(8, 20, 16, 16, device=device)
    whole, parts = Aligner(12, 20).to(device), Aligner(12, 20).to(device)
    with Largest() as at_once:
        whole.start(own, other)
    limit = at_once.most // 3
    monkeypatch.setattr(feature, "MOMENT_BYTES", limit)
    with Largest() as bounded:
        parts.start(own, other)
    assert bounded.most <= limit
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(parts.bias, whole.bias, rtol=1e-6, atol=1e-7)


class FullAt(TrainHook):
    """A hook that raises `error` at one step, as if memory did not suffice. None: it asks the device for 16 TiB."""

    def __init__(self, step: int, error: RuntimeError | None) -> None:
        self.step, self.error = step, error
        self.batches: list[int] = []

    def extra_loss(self, batch: Any, predictions: Any) -> dict[str, Tensor]:
        if isinstance(predictions, dict):
            self.batches.append(len(batch["img"]))
            if len(self.batches) == self.step:
                if self.error is None:
                    torch.empty(1 << 44, dtype=torch.uint8, device=batch["img"].device)
                    raise AssertionError("16 TiB of memory")
                raise self.error
        return {}


@pytest.mark.parametrize(
    ("step", "error"),
    [
        (1, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")),
        (2, RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)")),
        (3, RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")),
        pytest.param(1, None, marks=pytest.mark.gpu),
    ],
    ids=["first step", "cublas", "second epoch", "cuda"],
)
def test_out_of_memory_names_batch_and_imgsz_and_never_trains_on_another_batch(
    step: int, error: RuntimeError | None, tmp_path: Path
) -> None:
    hook = FullAt(step, error)
    dataset = small_set(tmp_path / "set")
    with pytest.raises(EnvironmentLacks) as caught:
        chosen = settings(device="cpu" if error else "0")
        trainer.train(model(), dataset, chosen, [hook], tmp_path / "work", "prune 2/3")
    message = str(caught.value)
    assert "prune 2/3: out of memory at batch 3 and imgsz 64: lower prune.batch or data.imgsz" in message
    assert hook.batches == [3] * step
    assert (tmp_path / "work" / "resume.pt").is_file() == (step > 2)


class Loud(TrainHook):
    """A hook with an extra module whose gradient is in the thousands and does not reach the student."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.extra = nn.ModuleDict({"loud": nn.Linear(1, 1), "quiet": nn.Linear(1, 1)})
        self.norms: dict[str, float] = {}

    def modules(self) -> nn.ModuleDict:
        return self.extra

    def extra_loss(self, batch: Any, predictions: Any) -> dict[str, Tensor]:
        ones = torch.ones(1, device=batch["img"].device)
        return {"loud": 1e4 * self.extra["loud"](ones).sum() + self.extra["quiet"](ones).sum() / 100}


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("0", marks=pytest.mark.gpu)])
def test_extras_do_not_shorten_the_steps_of_the_student(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, sgd = small_set(tmp_path / "set"), settings(optimizer="SGD", lr0=0.01, device=device, amp=False)
    alone = trainer.train(model(), dataset, sgd, [], tmp_path / "alone", "t")
    hook = Loud()
    step = trainer.HookedTrainer.optimizer_step

    def look(hooked: trainer.HookedTrainer) -> None:
        zero = hooked.optimizer.zero_grad
        hooked.optimizer.zero_grad = lambda: hook.norms.update(
            {name: float(nn.utils.get_total_norm([p.grad for p in part.parameters()])) for name, part in hook.extra.items()}
        )  # fmt: skip
        step(hooked)
        hooked.optimizer.zero_grad = zero
        zero()

    monkeypatch.setattr(trainer.HookedTrainer, "optimizer_step", look)
    beside = trainer.train(model(), dataset, sgd, [hook], tmp_path / "beside", "t")
    for (name, mine), other in zip(beside.state_dict().items(), alone.state_dict().values(), strict=True):
        assert torch.equal(mine, other) if device == "cpu" else torch.allclose(mine, other, rtol=0.05, atol=1e-3), name
    assert hook.norms["loud"] == pytest.approx(10.0, rel=1e-4), "clipped by itself"
    assert hook.norms["quiet"] == pytest.approx(0.03 * 2**0.5, rel=1e-3), "not clipped for the other"
