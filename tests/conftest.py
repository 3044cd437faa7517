"""Every test sees ultralytics as the package does, hardened before its first import, and none of its user's variables."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.given import GIVEN
from yolo_compress.hardening import harden

harden()


@pytest.fixture(scope="session", autouse=True)
def _no_variable_is_set() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in GIVEN:
            patch.delenv(name)
        yield


def pytest_configure(config: pytest.Config) -> None:
    """Workers of pytest-xdist share the processors out: threads of two that spin on the same one cost ten times the time."""
    if worker := getattr(config, "workerinput", None):
        share = sorted(os.sched_getaffinity(0))[int(worker["workerid"][2:]) :: worker["workercount"]]
        os.sched_setaffinity(0, share or os.sched_getaffinity(0))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What one worker has to run: a file, so that its fixtures are made once; and all that stands on the finished chain."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            on_chain = {"finished", "chain"} & set(getattr(item, "fixturenames", ()))
            item.add_marker(pytest.mark.xdist_group("chain" if on_chain else item.path.stem))
