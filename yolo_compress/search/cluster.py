"""The door to Ray: the trials of a study as tasks of a cluster (`search.workers=ray`).

A task is a worker for one trial, on a node that Ray chooses. It takes the trial from the study's folder and runs its process, as a
worker that was started by hand does (`worker.py`). Ray only starts tasks and says which of them died. So a node that dies costs no
more than such a worker: its trial is given out again, once. Ray is an optional package and is imported when it is used.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from yolo_compress import __version__, home, progress
from yolo_compress.errors import CompressError, EnvironmentLacks, Locked, RecipeError, Terminated
from yolo_compress.files.lock import lock
from yolo_compress.recipe.recipe import Recipe
from yolo_compress.runtime.errors import RuntimeFailure
from yolo_compress.runtime.registry import RUNTIMES
from yolo_compress.search.front import Choice
from yolo_compress.search.machine import check_runtime, processor
from yolo_compress.search.study import Study, open_study
from yolo_compress.search.worker import PATIENCE_S, Taken, Worker, with_optuna

if TYPE_CHECKING:
    from ray import ObjectRef

INSTALL = "pip install 'yolo-compress[ray]'"
ADDRESS = "RAY_ADDRESS"  # variable of Ray: the cluster to join
MARK = ".ray"  # in the study's folder; its lock is held by the command, so a task that could take it does not share the folder
OPENMP = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
NOT_IMPORTED = "failed to import"  # in Ray's error if it does not find this module on the node
POLL_S = 1.0
NEW_NODES_S = 10.0  # time after which the command looks for new nodes, even if no task ended
# So many deaths for each task that fits into the cluster, and no trial that ended: then the cluster is at fault.
DEATHS_MOST = 3

Make = Callable[[Study], Worker]


class Place(NamedTuple):
    """What a task needs to join the study. The study itself is in its folder.

    Attributes:
        variables: Environment variables of the command, by name. One is the folder with `searches/`, `weights/` and `datasets/`.
        folder: Working directory of the command. Relative paths in the recipe start from it.
        study: Name of the study.
        overrides: Settings of the machine, such as ("run.device", "0").
        version: Version of yolo-compress.
    """

    variables: tuple[tuple[str, str], ...]
    folder: str
    study: str
    overrides: tuple[tuple[str, str], ...]
    version: str


class Needs(NamedTuple):
    """Processors and GPUs that a task reserves on its node."""

    cpus: int
    gpus: int

    def fit(self, node: Mapping[str, float]) -> int:
        """Return how many tasks fit on a node with these resources."""
        on_gpus = int(node.get("GPU", 0)) // self.gpus if self.gpus else None
        on_cpus = int(node.get("CPU", 0)) // self.cpus
        return on_cpus if on_gpus is None else min(on_cpus, on_gpus)


def require() -> None:
    """Check that Ray is installed.

    Raises:
        EnvironmentLacks: It is not. The message has the command that installs it.
    """
    if importlib.util.find_spec("ray") is None:
        raise EnvironmentLacks(f"ray is not installed, and search.workers=ray needs it: {INSTALL}")


def needs(base: Recipe, nodes: Sequence[Mapping[str, float]]) -> Needs:
    """Return what a task reserves: a GPU if the recipe or the runtime uses one, and `run.threads` processors.

    If `run.threads` is null, a task without a GPU reserves as many processors as the smallest node has, and one with a GPU one of them.

    Args:
        base: Recipe of the study.
        nodes: Resources of each node: "CPU" and "GPU" -> number.

    Raises:
        EnvironmentLacks: No node has room for a task.
    """
    assert base.search is not None
    gpus = int(base.run.device != "cpu" or RUNTIMES[base.search.runtime].gpu)
    able = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1 and node.get("GPU", 0) >= gpus]
    found = Needs(base.run.threads or (1 if gpus else min(able, default=1)), gpus)
    if not any(found.fit(node) for node in nodes):
        wanted = f"{found.cpus} CPU{'s' if found.cpus > 1 else ''}{' and a GPU' if gpus else ''}"
        raise EnvironmentLacks(
            f"no node of the Ray cluster has {wanted} for a trial: add such a node, or change run.threads, run.device or search.runtime"
        )
    return found


def run(study: Study, make: Make = with_optuna) -> Choice:
    """Run the trials as tasks until there is none left or the time is over. Return the choice.

    Args:
        study: The study.
        make: Makes the worker of a task. It is called in the task, and Ray finds it there by its name.

    Raises:
        CompressError: As for `Worker.run`; or the cluster cannot be reached, has no room for a trial, or a node does not share the
            study's folder.
    """
    device = () if study.base.run.device == "cpu" else (("run.device", "0"),)  # the GPU that Ray gives the task
    place = Place(_variables(), os.getcwd(), study.name, device, __version__)
    with _connected(), lock(study.folder / MARK, f"search with Ray, study {study.name}", shared=True):
        _check_nodes(study, place)
        _Tasks(study, place, make).run()
    return study.choice(study.trials())


def _variables() -> tuple[tuple[str, str], ...]:
    """Return the variables that tasks need: those of yolo-compress, and those that say how OpenMP waits."""
    found = {name: value for name, value in os.environ.items() if name.startswith("YOLO_COMPRESS_")}
    found |= {name: os.environ[name] for name in OPENMP if name in os.environ}
    return tuple(sorted((found | {home.VARIABLE: str(home.searches().parent.absolute())}).items()))


class _Tasks:
    """The tasks of one command that have not ended."""

    def __init__(self, study: Study, place: Place, make: Make) -> None:
        self.study, self.place, self.make = study, place, make
        self.running: list[ObjectRef] = []
        self.room = 1  # tasks that fit into the cluster at once

    def run(self) -> None:
        """Keep as many tasks as the cluster has room for, until no trial is left or the time is over."""
        deaths, over, more = 0, False, True  # more: whether there may be a trial to give out
        try:
            while True:
                if more and not over:
                    self._start()
                if not self.running:
                    if over or not self.study.unfinished():
                        return
                    time.sleep(POLL_S)  # the process of a dead worker is ending, or another worker runs the last trial
                    more = True
                    continue
                for taken in self._ended():
                    deaths = deaths + 1 if taken is None else 0 if taken == "ended" else deaths
                    more, over = taken != "none", over or taken == "over"
                if deaths > DEATHS_MOST * self.room:
                    raise CompressError(
                        f"search: {deaths} tasks of the Ray cluster died in a row: look at the logs of its nodes"
                    )
        finally:
            self._cancel()

    def _start(self) -> None:
        import ray

        nodes = [resources for _, resources in _nodes()]
        need = needs(self.study.base, nodes)
        task = ray.remote(num_cpus=need.cpus, num_gpus=need.gpus, max_retries=0)(_run_one)
        self.room = sum(need.fit(node) for node in nodes)
        for _ in range(self.room - len(self.running)):
            self.running.append(task.remote(self.place, self.make))

    def _ended(self) -> list[Taken | None]:
        """Wait until tasks end, and return their answers. None: the task, or its node, died."""
        import ray

        ended, self.running = ray.wait(self.running, num_returns=1, timeout=NEW_NODES_S)
        return [_answer(one) for one in ended]

    def _cancel(self) -> None:
        """End the tasks that still run in good order, so that their trials are given back."""
        import ray

        for one in self.running:
            ray.cancel(one)
        if self.running:  # a task waits `PATIENCE_S` for its process
            ray.wait(self.running, num_returns=len(self.running), timeout=2 * PATIENCE_S)


def _answer(task: ObjectRef) -> Taken | None:
    """Return the answer of a task that has ended. None: it, or its node, died.

    Raises:
        Exception: What the task raised.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        answer: Taken = ray.get(task)
    except RayTaskError as error:
        raise error.cause from error
    except RayError as error:
        progress.say(f"search: a task of the cluster died ({type(error).__name__}); its trial is given out again, once")
        return None
    return answer


def _nodes() -> list[tuple[str, Mapping[str, float]]]:
    """Return (id, resources) of each node that lives."""
    import ray

    return [(node["NodeID"], node["Resources"]) for node in ray.nodes() if node["Alive"]]


def _check_nodes(study: Study, place: Place) -> None:
    """Check that each node with room for a trial shares the study's folder, and that all have the same processor.

    Raises:
        EnvironmentLacks: A node does not share it.
        RecipeError: The search lowers the latency, and two nodes have different processors.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = _nodes()
    need = needs(study.base, [resources for _, resources in nodes])
    task = ray.remote(num_cpus=0, num_gpus=need.gpus, max_retries=0)(_host_and_processor)
    tasks = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(name, soft=False)).remote(place)
        for name, resources in nodes
        if need.fit(resources)
    ]
    progress.say(
        f"search: {len(tasks)} {'nodes' if len(tasks) > 1 else 'node'} of the Ray cluster can run trials; checking them"
    )
    found: dict[str, str] = {}  # processor -> host
    for one in tasks:
        answer = _checked(one)
        found.setdefault(answer[1], answer[0])
    if study.goal.cost == "latency" and len(found) > 1:
        listed = ", ".join(f"{host} has {name}" for name, host in found.items())
        raise RecipeError(
            f"nodes of the Ray cluster have different processors, and latencies of two cannot be compared ({listed}): search on nodes "
            "with the same processor and GPU, or with search.cost=size"
        )


def _checked(task: ObjectRef) -> tuple[str, str]:
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        answer: tuple[str, str] = ray.get(task)
    except RayTaskError as error:
        if isinstance(error.cause, ImportError) or NOT_IMPORTED in str(error.cause):
            raise EnvironmentLacks(
                f"a node of the Ray cluster cannot run yolo-compress ({_cause(error.cause)}): install it there, with the extra ray"
            ) from None
        raise error.cause from error
    except RayError as error:
        raise EnvironmentLacks(
            f"a node of the Ray cluster does not answer ({_cause(error)}): look at its logs"
        ) from None
    return answer


def _cause(error: Exception) -> str:
    """Return the last line of a message of Ray: a traceback of another process may be above it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


@contextmanager
def _connected() -> Iterator[None]:
    """Join the cluster of `RAY_ADDRESS`, or the one that runs on this machine, or start one on this machine for the time of the block.

    Raises:
        EnvironmentLacks: The cluster cannot be reached.
    """
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that is started here sends nothing to anybody
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(logging_level=logging.ERROR)
    except (ConnectionError, ImportError, RuntimeError, ValueError) as error:
        where = f"{ADDRESS}={os.environ[ADDRESS]}" if os.environ.get(ADDRESS) else "on this machine"
        raise EnvironmentLacks(
            f"the Ray cluster ({where}) cannot be reached: {_cause(error)}; start it with `ray start`, or set {ADDRESS}=local for one "
            "of this machine alone"
        ) from None
    finally:
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray replaces the handler that ends this command in good order
    try:
        with _ended_by_sigterm():
            yield
    finally:
        ray.shutdown()


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM raise `Terminated` from the block. Ray drops every exception of a handler while it waits, but KeyboardInterrupt."""
    terminated = False

    def interrupt(number: int, frame: object) -> None:
        nonlocal terminated
        terminated = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        if terminated:
            raise Terminated from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


# In a task, on a node of the cluster


def _run_one(place: Place, make: Make) -> Taken:
    """Be a worker of the study for one trial."""
    with _errors_that_travel():
        return make(entered(place)).run_one()


def _host_and_processor(place: Place) -> tuple[str, str]:
    """Return the host's name and the processor that it times engines on, after the check of the folder."""
    with _errors_that_travel():
        runtime = entered(place).goal.runtime
        check_runtime(runtime)
        return socket.gethostname(), processor(runtime)


def entered(place: Place) -> Study:
    """Go to the working directory of the command, and open the study there.

    Raises:
        EnvironmentLacks: This node has another version of yolo-compress, it does not share the folder with the command, or locks do
            not work between the two.
    """
    host = socket.gethostname()
    if place.version != __version__:
        raise EnvironmentLacks(
            f"{host} has yolo-compress {__version__}, the command is of {place.version}: install the same version"
        )
    shared = "searches/, weights/ and datasets/ have to be on a file system that all nodes share"
    os.environ.update(place.variables)
    mark = home.searches() / place.study / MARK
    try:
        os.chdir(place.folder)
    except OSError as error:
        raise EnvironmentLacks(
            f"{host}: {place.folder}: {error.strerror}: the working directory and {shared}"
        ) from None
    if not mark.is_file():
        raise EnvironmentLacks(f"{host}: {mark.parent} does not have the study's files: {shared}")
    try:
        with lock(mark, "a check of the shared folder", wait=False):
            pass
    except Locked:
        return open_study(place.study, place.overrides)
    raise EnvironmentLacks(
        f"{host}: {mark.parent} is a copy, or locks of this file system work on one machine only: {shared}, with locks (flock)"
    )


@contextmanager
def _errors_that_travel() -> Iterator[None]:
    """Turn errors of the runtime package, which cannot be pickled, into errors that reach the command."""
    try:
        yield
    except RuntimeFailure as error:
        raise EnvironmentLacks(f"{socket.gethostname()}: {error}") from None
