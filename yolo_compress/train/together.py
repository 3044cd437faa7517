"""Ranks that train together: the process group of a whole command, what rank 0 shares, and how its end reaches the others.

Only rank 0 plans, measures, reads and writes the store. The others wait for trainings: they get the model, the data and the
hooks of each from rank 0, so no rank can decide otherwise than another.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from yolo_compress import ranks
from yolo_compress.data.dataset import Dataset
from yolo_compress.errors import LostRank, RecipeError
from yolo_compress.train.hook import TrainHook
from yolo_compress.train.settings import TrainSettings

Made = TypeVar("Made")
STEP_PATIENCE = timedelta(hours=3)  # for one collective call of a training, as Ultralytics has it
PATIENCE = timedelta(days=30)  # of ranks that wait for the next training; one that ended is noticed at once

_control: Any = None  # the group, on CPUs, over which rank 0 shares what is no tensor of the training


@dataclass(frozen=True)
class Training:
    """What `trainer.train` is given."""

    model: nn.Module
    dataset: Dataset
    settings: TrainSettings
    hooks: Sequence[TrainHook]
    work: Path
    what: str


@contextmanager
def formed(device: str, agreed: Mapping[str, str]) -> Iterator[None]:
    """All ranks of a command, inside the block.

    Args:
        device: `run.device` of this machine.
        agreed: What has to be the same on all ranks, by name.

    Raises:
        RecipeError, EnvironmentLacks: See `ranks.check_devices`; or, on rank 0, ranks differ in `agreed`.
        LostRank: Another rank ended.
    """
    global _control
    ranks.check_devices(device, torch.cuda.device_count())
    on_gpu = device != "cpu"
    if on_gpu:
        torch.cuda.set_device(int(ranks.own_device(device)))
    with _losses():
        distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=STEP_PATIENCE)
        _control = distributed.new_group(backend="gloo", timeout=PATIENCE)
        try:
            _compare(agreed)
            yield
            distributed.barrier(_control)
            distributed.destroy_process_group()
        finally:
            _control = None


@contextmanager
def _losses() -> Iterator[None]:
    """Turns what a broken connection raises, wherever a rank notices it, into LostRank."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, distributed.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "by peer")):
            raise LostRank(
                "the connection to another rank is lost: it ended, or its machine did; the same command continues"
            ) from error
        raise


def _compare(agreed: Mapping[str, str]) -> None:
    every: list[Any] = [None] * ranks.world()
    distributed.all_gather_object(every, dict(agreed), group=_control)
    for number, other in enumerate(every):
        if different := [name for name in every[0] if other.get(name) != every[0][name]]:
            if ranks.rank() > 0:
                raise LostRank(f"rank {number} differs from rank 0")
            raise RecipeError(
                f"rank {number} was started with another {' and another '.join(different)} than rank 0: give every machine the "
                "same command, recipe and versions"
            )


def is_formed() -> bool:
    """Whether this is one of several ranks inside `formed`."""
    return _control is not None


def from_rank_0(make: Callable[[], Made]) -> Made:
    """What `make` gives on rank 0, on all ranks; elsewhere it is not called. Tensors come to the CPU."""
    if not is_formed():
        return make()
    if ranks.rank() == 0:
        made = make()
        buffer = io.BytesIO()
        torch.save(made, buffer)
        content = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
        distributed.broadcast(torch.tensor([len(content)]), src=0, group=_control)
        distributed.broadcast(content, src=0, group=_control)
        return made
    size = torch.zeros(1, dtype=torch.int64)
    distributed.broadcast(size, src=0, group=_control)
    content = torch.empty(int(size), dtype=torch.uint8)
    distributed.broadcast(content, src=0, group=_control)
    # written by rank 0 of this very command
    received: Made = torch.load(io.BytesIO(content.numpy().tobytes()), map_location="cpu", weights_only=False)
    return received


def share(training: Training) -> None:
    """On rank 0: have the other ranks take part in this training."""
    if is_formed():
        from_rank_0(lambda: replace(training, dataset=replace(training.dataset, files=())))


def end(result: Any) -> None:
    """On rank 0: tell the others that there is no further training."""
    from_rank_0(lambda: result)


def follow(take_part: Callable[[Training], None]) -> Any:
    """On another rank: take part in the trainings of rank 0; returns the result that it ends with."""
    while isinstance(received := from_rank_0(lambda: None), Training):
        take_part(received)
    return received


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors by those of rank 0, in place, on their devices."""
    if not is_formed():
        return
    for tensor in tensors:
        sent = (
            tensor.detach().to(torch.uint8) if tensor.dtype == torch.bool else tensor.detach().contiguous()
        )  # gloo: no bool
        distributed.broadcast(sent, src=0)
        with torch.no_grad():
            tensor.copy_(sent)


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """The mean of the gradients over the ranks; where a parameter has one on some ranks alone, the others count as 0."""
    if not is_formed() or not parameters:
        return
    has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    distributed.all_reduce(has, op=distributed.ReduceOp.MAX)
    for parameter, anywhere in zip(parameters, has.tolist(), strict=True):
        if not anywhere:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        distributed.all_reduce(parameter.grad)  # gloo has no mean
        parameter.grad /= ranks.world()
