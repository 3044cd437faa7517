"""Rank, number of processes and devices in distributed training, from the variables of torchrun. Imports no torch.

Rank 0 runs the command. The other ranks only take part in its trainings (`train/together.py`).
"""

from __future__ import annotations

import os

from yolo_compress.errors import EnvironmentLacks, RecipeError

RUN = "yolo-compress-"  # prefix of the run id if `yolo-compress` started the ranks; it then reports how they ended

VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # beside WORLD_SIZE


def rank() -> int:
    """Return the rank of this process among all processes of the run: 0 if it is the only one."""
    return _number("RANK", 0) if several() else 0


def world() -> int:
    """Return the number of processes on all machines."""
    return _number("WORLD_SIZE", 1)


def local_rank() -> int:
    """Return the rank of this process among the processes of the run on this machine."""
    return _number("LOCAL_RANK", 0) if several() else 0


def local_world() -> int:
    """Return the number of processes on this machine."""
    return _number("LOCAL_WORLD_SIZE", world()) if several() else 1


def several() -> bool:
    """Return whether the run has more than one process."""
    return world() > 1


def launched() -> bool:
    """Return whether `yolo-compress` itself started this rank. False: the user started it, with torchrun."""
    return several() and os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(RUN)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else default  # `check_environment` rejects text that is not a number


def forget_foreign() -> None:
    """Delete torchrun's variables from the environment if another program has set some of them. Only for commands that never train."""
    complete = all(name in os.environ for name in NEEDED) and all(
        os.environ.get(name, "0").isdigit() for name in VARIABLES
    )
    if not complete:
        for name in VARIABLES:
            os.environ.pop(name, None)


def check_environment() -> None:
    """Check that the variables of torchrun are complete and consistent.

    If torchrun started one process, its variables are deleted. Otherwise Ultralytics would wait for a process group.

    Raises:
        EnvironmentLacks: A variable is missing, is not a number or contradicts another.
    """
    for name in VARIABLES:
        if not os.environ.get(name, "0").isdigit():
            raise EnvironmentLacks(
                f"the environment has {name}={os.environ[name]!r}, expected a number as torchrun sets it"
            )
    if not several():
        for name in ("RANK", "LOCAL_RANK"):
            if _number(name, 0) > 0:
                raise EnvironmentLacks(
                    f"the environment has {name}={os.environ[name]} without WORLD_SIZE; unset {name}"
                )
            os.environ.pop(name, None)
        return
    if missing := [name for name in NEEDED if name not in os.environ]:
        raise EnvironmentLacks(
            f"the environment has WORLD_SIZE={world()} without {', '.join(missing)}: unset WORLD_SIZE, or start the processes "
            "with torchrun"
        )
    if not rank() < world():
        raise EnvironmentLacks(f"the environment has RANK={rank()}, expected a number below WORLD_SIZE={world()}")


def devices(device: str) -> list[str]:
    """Split `run.device` into devices: "cpu", or CUDA indices."""
    return device.split(",")


def check_devices(device: str, found: int) -> None:
    """Check that the GPUs of `run.device` exist, and that this machine runs one process per GPU.

    Args:
        device: `run.device`.
        found: Number of CUDA devices that torch sees.

    Raises:
        EnvironmentLacks: A GPU does not exist.
        RecipeError: The number of GPUs differs from the number of processes on this machine.
    """
    if device == "cpu":
        return
    named = devices(device)
    if missing := [index for index in named if int(index) >= found]:
        there = "no GPU" if not found else f"{found} GPU" + ("s" if found > 1 else "")
        raise EnvironmentLacks(
            f"run.device={device}: there is no GPU {', '.join(missing)}, torch sees {there} here; give run.device=cpu or "
            "indices of existing GPUs"
        )
    if several() and len(named) != local_world():
        raise RecipeError(
            f"run.device={device}: the number of GPUs is {len(named)}, but torchrun started {local_world()} processes here; "
            "give as many GPUs as processes"
        )


def own_device(device: str) -> str:
    """Return the entry of `run.device` that this rank computes on, such as "cpu" or a CUDA index."""
    named = devices(device)
    return named[local_rank()] if len(named) > 1 else named[0]


def check_batch(key: str, batch: int) -> None:
    """Check that the batch size is a multiple of the number of processes.

    Otherwise a run would train with a smaller batch than it records.

    Args:
        key: Name of the knob, for the message.
        batch: Images per batch over all processes.

    Raises:
        RecipeError: The batch size is not a multiple. The message gives the nearest multiple.
    """
    if batch % world():
        near = max(1, round(batch / world())) * world()
        raise RecipeError(
            f"{key}={batch}: {world()} processes share a batch evenly, expected a multiple of {world()}; the nearest is {near}"
        )
