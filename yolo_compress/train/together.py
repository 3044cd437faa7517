"""Distributed training: form the process group of a command, and share the trainings of rank 0 with the other ranks.

Only rank 0 plans, measures, and reads and writes the store. The other ranks wait for a training. They receive its model, data
and hooks from rank 0, so all ranks make the same decisions.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from socket import socket
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, distributed, nn

from yolo_compress import ranks
from yolo_compress.data.dataset import Dataset
from yolo_compress.errors import CompressError, EnvironmentLacks, LostRank, NumericsError, Terminated
from yolo_compress.exits import explain
from yolo_compress.train import connection
from yolo_compress.train.hook import TrainHook
from yolo_compress.train.settings import TrainSettings

Made = TypeVar("Made")
STEP_PATIENCE = timedelta(hours=3)  # timeout of one collective call among ranks that all live, as in Ultralytics
GRACE_S = 10.0  # time in which a rank that lost another, or failed, ends by itself
INTERRUPTIONS = 4  # how often it is interrupted in that time
BUCKET = 1 << 24  # values that one collective call averages

# In messages of gloo and NCCL about another rank that ended or does not answer.
PEER_ENDED = ("by peer", "Broken pipe", "Socket closed", "remote process", "imed out", "imeout")


@dataclass(frozen=True)
class _Group:
    """The process group of this command. `connections` are those of `connection.connect`."""

    connections: list[socket]
    stop_watching: Callable[[], None]


_group: _Group | None = None
_formations = itertools.count()  # torchrun's store outlives a group


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

    If another rank ends, this one does, too, after `GRACE_S` at the latest, whatever it waits for.

    Args:
        device: `run.device` of this machine.
        agreed: Values that must be equal on all ranks, by name.

    Raises:
        RecipeError, EnvironmentLacks: See `ranks.check_devices` and `connection.connect`.
        LostRank: Another rank ended.
    """
    global _group
    ranks.check_devices(device, torch.cuda.device_count())
    on_gpu = device != "cpu"
    if on_gpu:
        torch.cuda.set_device(int(ranks.own_device(device)))
    store, connections = connection.connect({**agreed, "device": _kind(on_gpu)}, next(_formations))
    with _ending_with_others(connections) as stop_watching, _losses():
        with _limited(
            connection.JOIN_S,
            EnvironmentLacks("the ranks cannot communicate: a firewall between the machines may block their ports"),
        ):
            distributed.init_process_group(
                "nccl" if on_gpu else "gloo",
                store=store,
                rank=ranks.rank(),
                world_size=ranks.world(),
                timeout=STEP_PATIENCE,
            )
            any_rank(torch.zeros(1, device="cuda" if on_gpu else "cpu"))  # NCCL connects at the first call
        _group = _Group(connections, stop_watching)
        yield
        distributed.destroy_process_group()
        if ranks.rank() == 0:  # the others watch these connections until they have the result
            connection.await_end(connections, GRACE_S)


def _kind(on_gpu: bool) -> str:
    """Return what decides how a device rounds: equal steps of equal weights then give equal weights on all ranks."""
    if not on_gpu:
        return "cpu"
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"cuda {found.major}.{found.minor}, {found.multi_processor_count} multiprocessors"


@contextmanager
def _ending_with_others(connections: list[socket]) -> Iterator[Callable[[], None]]:
    """Watch the connections during the block, and close them after it. Yield a function that stops watching.

    If one ends, `Terminated` interrupts the main thread, and becomes LostRank here. Python drops an exception in a destructor, so the
    thread is interrupted again. A thread that waits in a library cannot be interrupted. Then the process ends after `GRACE_S`, as by a
    kill.
    """
    global _group
    lost, ended = threading.Event(), threading.Event()
    main = threading.main_thread()
    interruptible = threading.current_thread() is main
    before = signal.signal(signal.SIGUSR1, _interrupt) if interruptible else None

    def end() -> None:
        lost.set()
        for _ in range(INTERRUPTIONS):
            if interruptible:
                signal.pthread_kill(main.ident, signal.SIGUSR1)  # type: ignore[arg-type]
            if ended.wait(GRACE_S / INTERRUPTIONS):
                return
        os._exit(explain(LostRank(connection.LOST), continues=True))

    with connection.watched(connections, end) as stop_watching, _silent_drops():
        try:
            yield stop_watching
        except BaseException as error:
            ended.set()
            if interruptible:
                signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            for one in connections:  # the other ranks end, too
                one.close()
            cause = LostRank(connection.LOST) if isinstance(error, Terminated) and lost.is_set() else error
            with _limited(GRACE_S, cause), suppress(RuntimeError, ValueError):
                distributed.destroy_process_group()  # gloo waits for calls in progress, which end with the other ranks
            if cause is error:
                raise
            raise cause from error
        finally:
            ended.set()
            _group = None
            for one in connections:
                one.close()
            if interruptible:
                signal.signal(signal.SIGUSR1, before)


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise Terminated


@contextmanager
def _silent_drops() -> Iterator[None]:
    """Print nothing when Python drops a `Terminated`, as in a destructor."""
    before = sys.unraisablehook

    def hook(dropped: Any) -> None:
        if not isinstance(dropped.exc_value, Terminated):
            before(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextmanager
def _limited(seconds: float, error: BaseException) -> Iterator[None]:
    """End the process with the message of `error` if the block takes longer. It waits in a library, which nothing interrupts."""
    timer = threading.Timer(seconds, lambda: os._exit(explain(error, continues=True)))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


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
            raise LostRank(connection.LOST) from error
        if isinstance(error, distributed.DistError) or "gloo" in text or "NCCL" in text:
            raise EnvironmentLacks(f"the ranks cannot communicate: {text.strip().splitlines()[0]}") from error
        raise


def _connections() -> list[socket]:
    if _group is None:
        raise AssertionError("several ranks must train inside `together.formed`")
    return _group.connections


def from_rank_0(make: Callable[[], Made]) -> Made:
    """Call `make` on rank 0 and return its result on all ranks. Other ranks get its tensors on the CPU."""
    if not ranks.several():
        return make()
    if ranks.rank() > 0:
        content = io.BytesIO(connection.receive(_connections()[0]))
        # unpickling is safe here: rank 0 of this command sent it
        received: Made = torch.load(content, map_location="cpu", weights_only=False)
        return received
    made, buffer = make(), io.BytesIO()
    torch.save(made, buffer)
    for one in _connections():
        connection.send(one, buffer.getbuffer())
    return made


def fail(error: CompressError) -> NoReturn:
    """Raise on all ranks. Every rank calls this: rank 0 raises `error`, and the others LostRank once rank 0 has ended.

    On a single process, raise `error`.
    """
    if _group is not None:
        _group.stop_watching()
        distributed.barrier()  # rank 0 must not end while another rank still watches it
        if ranks.rank() > 0:
            connection.await_end(_group.connections, GRACE_S)
            raise LostRank(f"rank 0 ended: {error}")
    raise error


def share(training: Training) -> None:
    """Send this training from rank 0 to the other ranks, which then take part in it."""
    if ranks.several():
        from_rank_0(lambda: replace(training, dataset=replace(training.dataset, files=())))


def end(result: Any) -> None:
    """Send the result from rank 0 to the other ranks, which then stop waiting for trainings."""
    if _group is not None:
        _group.stop_watching()  # they end as soon as they have it
    from_rank_0(lambda: result)


def follow(take_part: Callable[[Training], None]) -> Any:
    """On a rank other than 0, take part in all trainings of rank 0. Return the result that rank 0 passed to `end`."""
    while isinstance(received := from_rank_0(lambda: None), Training):
        take_part(received)
    if _group is not None:
        _group.stop_watching()
    return received


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Overwrite the tensors in place, on all ranks, with the values on rank 0. All are on one device."""
    tensors = [tensor.detach() for tensor in tensors]
    if not ranks.several() or not tensors:
        return
    content = torch.cat([_bytes(tensor) for tensor in tensors])
    distributed.broadcast(content, src=0)
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    for tensor, part in zip(tensors, content.split(sizes), strict=True):
        tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Average the gradients of the parameters over all ranks, in place. All have one device and type.

    If only some ranks have a gradient for a parameter, a missing gradient counts as 0.
    """
    if not ranks.several():
        return
    rest = list(parameters)
    while rest:
        bucket: list[nn.Parameter] = []
        values = 0
        while rest and (not bucket or values + rest[0].numel() <= BUCKET):
            values += rest[0].numel()
            bucket.append(rest.pop(0))
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        has = torch.tensor([float(p.grad is not None) for p in bucket]).to(gradients[0])
        content = torch.cat([has, *(gradient.flatten() for gradient in gradients)])
        distributed.all_reduce(content)  # sum, then divide: gloo has no mean
        anywhere, *averages = (content / ranks.world()).split([len(bucket), *(p.numel() for p in bucket)])
        for parameter, gradient, found, average in zip(bucket, gradients, anywhere.tolist(), averages, strict=True):
            if found:
                parameter.grad = gradient.copy_(average.view_as(gradient))


def any_rank(flag: Tensor) -> bool:
    """Return on all ranks whether a scalar is true on any of them."""
    if ranks.several():
        flag = flag.to(torch.int32)
        distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
    return bool(flag)


def of_each_rank(value: Made) -> list[Made]:
    """Return on all ranks the values of each, in the order of the ranks."""
    if not ranks.several():
        return [value]
    every: list[Any] = [None] * ranks.world()
    distributed.all_gather_object(every, value)
    return every


def check_equal(parameters: Iterable[Tensor], what: str) -> None:
    """Check that the parameters are equal on all ranks, bit for bit.

    Raises:
        NumericsError: On rank 0, if they differ. The other ranks raise LostRank.
    """
    if not ranks.several():
        return
    digest = hashlib.sha256()
    for parameter in parameters:
        digest.update(_bytes(parameter.detach()).cpu().numpy())
    every = of_each_rank(digest.hexdigest())
    for number, other in enumerate(every):
        if other != every[0]:
            fail(
                NumericsError(
                    f"{what}: the weights of rank {number} are not those of rank 0, so one of them computes wrong; train on "
                    "GPUs of one kind, or on one GPU"
                )
            )
