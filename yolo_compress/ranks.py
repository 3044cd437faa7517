"""Several processes that train one model: what torchrun tells each of them about itself and the others. Imports no torch.

Rank 0 runs the command. The other ranks take part in its trainings and do nothing else (`train/together.py`).
"""

from __future__ import annotations

import os

from yolo_compress.errors import EnvironmentLacks, RecipeError

RUN = "yolo-compress-"  # starts the name of runs that a command line of ours has started: it says how their ranks ended


def rank() -> int:
    """Number of this process among all; 0 where there is one."""
    return _number("RANK", 0) if several() else 0


def world() -> int:
    """Number of processes on all machines."""
    return _number("WORLD_SIZE", 1)


def local_rank() -> int:
    """Number of this process on this machine."""
    return _number("LOCAL_RANK", 0) if several() else 0


def local_world() -> int:
    """Number of processes on this machine."""
    return _number("LOCAL_WORLD_SIZE", world()) if several() else 1


def several() -> bool:
    """Whether this process is one of several."""
    return world() > 1


def launched() -> bool:
    """Whether a command line of ours started this rank, see `RUN`."""
    return several() and os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(RUN)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else default  # `check_environment` refuses what is no number


def check_environment() -> None:
    """Refuse an environment that names several processes without saying which one this is.

    A torchrun of one process is no distributed run: its variables are dropped, or Ultralytics would wait for a process group.

    Raises:
        EnvironmentLacks: See above.
    """
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
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
    if missing := [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise EnvironmentLacks(
            f"the environment has WORLD_SIZE={world()} without {', '.join(missing)}: unset WORLD_SIZE, or start the processes "
            "with torchrun"
        )
    if not rank() < world():
        raise EnvironmentLacks(f"the environment has RANK={rank()}, expected a number below WORLD_SIZE={world()}")


def devices(device: str) -> list[str]:
    """The devices of `run.device`: "cpu", or CUDA indices."""
    return device.split(",")


def check_devices(device: str, found: int) -> None:
    """Refuse devices that are not there, or not as many as the processes on this machine.

    Args:
        device: `run.device`.
        found: CUDA devices that torch sees.

    Raises:
        EnvironmentLacks: A GPU is not there.
        RecipeError: Processes on this machine and GPUs differ in number.
    """
    if device == "cpu":
        return
    named = devices(device)
    if missing := [index for index in named if int(index) >= found]:
        there = "no GPU" if not found else f"{found} GPU" + ("s" if found > 1 else "")
        raise EnvironmentLacks(
            f"run.device={device}: there is no GPU {', '.join(missing)}, torch sees {there} here; give run.device=cpu or "
            "indices that are there"
        )
    if several() and len(named) != local_world():
        raise RecipeError(
            f"run.device={device} names {len(named)} of the GPUs, torchrun started {local_world()} processes on this machine; "
            "give one GPU a process"
        )


def own_device(device: str) -> str:
    """The device of this rank, one of `run.device`."""
    named = devices(device)
    return named[local_rank()] if len(named) > 1 else named[0]


def check_batch(key: str, batch: int) -> None:
    """Refuse a batch that ranks cannot share evenly: a run would train on a smaller one than it records.

    Raises:
        RecipeError: See above.
    """
    if batch % world():
        near = max(1, round(batch / world())) * world()
        raise RecipeError(f"{key}={batch}: {world()} processes share a batch evenly; the nearest that fits is {near}")
