"""Every test sees ultralytics as the package does, hardened before its first import, and none of its user's variables."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.given import GIVEN
from yolo_compress.nets.hardening import harden

harden()


@pytest.fixture(scope="session", autouse=True)
def _no_variable_is_set(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in GIVEN:
            patch.delenv(name)
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))  # build.py records its engines there
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Rounding ties depend on how torch splits a sum between threads, and a model with random weights amplifies them. With
    one thread the bounds hold on any machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_configure(config: pytest.Config) -> None:
    """Workers of pytest-xdist share the processors out: threads of two that spin on the same one cost ten times the time."""
    if worker := getattr(config, "workerinput", None):
        share = sorted(os.sched_getaffinity(0))[int(worker["workerid"][2:]) :: worker["workercount"]]
        os.sched_setaffinity(0, share or os.sched_getaffinity(0))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test marked gpu needs one; asked for where there is none, it is skipped and says so."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table of `make gpu-test`: what a user with a GPU can send us."""
    if not config.option.markexpr.startswith("gpu"):
        return
    import torch
    import ultralytics

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    terminalreporter.section("GPU tests")
    terminalreporter.line(
        f"torch {torch.__version__}, ultralytics {ultralytics.__version__}, GPUs: {', '.join(gpus) or 'none'}"
    )
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            name = report.nodeid.removeprefix("tests/")
            terminalreporter.line(f"{outcome:<8} {getattr(report, 'duration', 0.0):7.1f} s  {name}")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A worker runs whole files, so that fixtures are made once; all files that stand on the finished chain count as one."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _file_or_chain(config.rootpath / nodeid.partition("::")[0])

    return ByFile(config, log)


@functools.cache
def _file_or_chain(path: Path) -> str:
    return "chain" if re.search(r"\b(finished|chain): Bench\b", path.read_text()) else str(path)
