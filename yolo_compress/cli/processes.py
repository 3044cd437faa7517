"""Start one process per GPU. With several GPUs in `run.device`, a command starts itself through torch's launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from yolo_compress import ranks
from yolo_compress.cli.grammar import Command
from yolo_compress.errors import EnvironmentLacks, LostRank, RecipeError, Terminated
from yolo_compress.exits import BUG, LOST_RANK, SIGTERM
from yolo_compress.progress import notice
from yolo_compress.runtime.measure.device import usable_cpus


def start(command: Command, words: Sequence[str], is_stage: bool) -> int | None:
    """Start the ranks of a command that trains on several GPUs, and wait for them.

    Args:
        command: The parsed `words`.
        words: The command line without the program.
        is_stage: Whether the verb is a stage, which may train.

    Returns:
        The exit code of the ranks. None if none were started: this process must run the command itself.

    Raises:
        RecipeError: torchrun started several processes for a command that needs one, or not as many processes as GPUs.
        EnvironmentLacks: See `ranks.check_environment` and `ranks.check_devices`.
    """
    alone = not is_stage or command.dry_run or "add" in command.options
    if alone:
        ranks.forget_foreign()
    ranks.check_environment()
    if ranks.several() and alone:
        raise RecipeError(f"{command.verb} runs in one process; start it without torchrun")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else gloo and NCCL describe a lost connection on many lines
    if ranks.several() or alone:
        return None
    device = command.load().run.device
    count = len(ranks.devices(device))
    if count == 1:
        return None
    import torch

    ranks.check_devices(device, torch.cuda.device_count())
    return launch(words, count)


def launch(words: Sequence[str], count: int) -> int:
    """Run `python -m yolo_compress WORDS` in `count` ranks on this machine; return their exit code.

    Raises:
        Terminated, KeyboardInterrupt: This process got a signal. The ranks have ended.
        EnvironmentLacks: The launcher cannot start the ranks.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # `_exit_code` reports how a rank ended
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cpus() // count)))
    with tempfile.TemporaryDirectory() as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=ranks.RUN + uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",  # not the name of this machine, which a container may not resolve
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "yolo_compress", *words)
        except ChildFailedError as error:
            return _exit_code(error.failures)
        except RendezvousError as error:
            raise EnvironmentLacks(f"cannot start the ranks: {str(error).strip().splitlines()[0]}") from error
        except SignalException as error:
            raise (KeyboardInterrupt if error.sigval == signal.SIGINT else Terminated) from error
    return 0


def _exit_code(failures: Mapping[int, Any]) -> int:
    """Return the exit code of the command, from the ranks that ended with an error.

    Ranks that were killed by a signal, and ranks that lost the connection to another rank, have printed no error. If no other rank
    has printed one, this function does.
    """
    codes = {
        rank: -signal.SIGTERM if failure.exitcode == SIGTERM else failure.exitcode for rank, failure in failures.items()
    }
    killed = {rank: -code for rank, code in sorted(codes.items()) if code < 0}
    own = [code for code in codes.values() if code > 0 and code != LOST_RANK]
    by_others = {rank: number for rank, number in killed.items() if number != signal.SIGTERM}
    if own and not by_others:  # the launcher ends the other ranks by SIGTERM
        return own[0]
    for rank, number in (by_others or killed).items():
        notice(
            f"error: rank {rank} was killed by {signal.Signals(number).name} and the other ranks have ended; the same "
            "command continues"
        )
        return BUG if number == signal.SIGSEGV else LostRank.exit_code
    notice("error: the ranks lost the connection to each other and have ended; the same command continues")
    return LostRank.exit_code
