"""Distributed training: form the process group of a command, and share the trainings of rank 0 with the other ranks.

Only rank 0 plans, measures, and reads and writes the store. The other ranks wait for a training. They receive its model, data
and hooks from rank 0, so all ranks make the same decisions.
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
from yolo_compress.errors import EnvironmentLacks, LostRank, RecipeError
from yolo_compress.train.hook import TrainHook
from yolo_compress.train.settings import TrainSettings

Made = TypeVar("Made")
STEP_PATIENCE = timedelta(hours=3)  # timeout of one collective call during training, as in Ultralytics
PATIENCE = timedelta(
    days=30
)  # timeout of ranks that wait for the next training; the end of a process is noticed at once

# In messages of gloo and NCCL about another rank that ended or does not answer.
PEER_ENDED = ("by peer", "Broken pipe", "Socket closed", "remote process", "imed out", "imeout")

_control: Any = None  # gloo group over which rank 0 sends trainings and results


@dataclass(frozen=True)
class Training:
    """The arguments of `trainer.train`, which rank 0 sends to the other ranks."""

    model: nn.Module
    dataset: Dataset
    settings: TrainSettings
    hooks: Sequence[TrainHook]
    work: Path
    what: str


@contextmanager
def formed(device: str, agreed: Mapping[str, str]) -> Iterator[None]:
    """Form the process group of all ranks of a command for the duration of the block.

    Args:
        device: `run.device` of this machine.
        agreed: Values that must be equal on all ranks, by name.

    Raises:
        RecipeError, EnvironmentLacks: See `ranks.check_devices`. Rank 0 also raises RecipeError if ranks differ in `agreed`.
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
    """Turn errors of the connection between ranks, inside the block, into errors that a user can fix.

    Raises:
        LostRank: Another rank closed the connection, or did not answer in time.
        EnvironmentLacks: The ranks cannot communicate for another reason. The message has the library's first line.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if any(word in text for word in PEER_ENDED):
            raise LostRank(
                "the connection to another rank is lost: its process or machine stopped; the same command continues"
            ) from error
        if isinstance(error, distributed.DistError) or "gloo" in text or "NCCL" in text:
            raise EnvironmentLacks(f"the ranks cannot communicate: {text.strip().splitlines()[0]}") from error
        raise


def _compare(agreed: Mapping[str, str]) -> None:
    """Check that `agreed` is equal on all ranks."""
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
    """Return whether this process is one of several ranks inside `formed`."""
    return _control is not None


def from_rank_0(make: Callable[[], Made]) -> Made:
    """Call `make` on rank 0 and return its result on all ranks. Other ranks get its tensors on the CPU."""
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
    # unpickling is safe here: rank 0 of this command sent it
    received: Made = torch.load(io.BytesIO(content.numpy().tobytes()), map_location="cpu", weights_only=False)
    return received


def share(training: Training) -> None:
    """Send this training from rank 0 to the other ranks, which then take part in it."""
    if is_formed():
        from_rank_0(lambda: replace(training, dataset=replace(training.dataset, files=())))


def end(result: Any) -> None:
    """Send the result from rank 0 to the other ranks, which then stop waiting for trainings."""
    from_rank_0(lambda: result)


def follow(take_part: Callable[[Training], None]) -> Any:
    """On a rank other than 0, take part in all trainings of rank 0. Return the result that rank 0 passed to `end`."""
    while isinstance(received := from_rank_0(lambda: None), Training):
        take_part(received)
    return received


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Overwrite the tensors in place, on all ranks, with the values on rank 0."""
    if not is_formed():
        return
    for tensor in tensors:
        sent = (
            tensor.detach().to(torch.uint8) if tensor.dtype == torch.bool else tensor.detach().contiguous()
        )  # gloo cannot send bool
        distributed.broadcast(sent, src=0)
        with torch.no_grad():
            tensor.copy_(sent)


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Average the gradients of the parameters over all ranks, in place.

    If only some ranks have a gradient for a parameter, a missing gradient counts as 0.
    """
    if not is_formed() or not parameters:
        return
    has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    distributed.all_reduce(has, op=distributed.ReduceOp.MAX)
    for parameter, anywhere in zip(parameters, has.tolist(), strict=True):
        if not anywhere:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        distributed.all_reduce(parameter.grad)  # sum, then divide: gloo has no mean
        parameter.grad /= ranks.world()
