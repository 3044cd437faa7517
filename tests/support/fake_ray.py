"""A stand-in for the package `ray`: tasks run in this process when they are waited for. A test chooses how each task ends."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


class RayError(Exception):
    """A task or its node died."""


class RayTaskError(RayError):
    """A task raised `cause`."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


class FakeRay(ModuleType):
    """`deaths` has the numbers of the tasks that die, in the order of their start; `started` and `cancelled` count."""

    def __init__(self, *cpus: int) -> None:
        super().__init__("ray")
        self.cpus, self.deaths, self.started, self.cancelled, self.inits = cpus, set[int](), 0, 0, 0
        self.results: dict[int, Any] = {}

    def init(self, **_: object) -> None:
        self.inits += 1

    def shutdown(self) -> None:
        self.inits -= 1

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {"NodeID": str(n), "Alive": cpus > 0, "Resources": {"CPU": float(cpus)}} for n, cpus in enumerate(self.cpus)
        ]

    def remote(self, **reserved: object) -> Callable[[Callable[..., Any]], Any]:
        assert reserved["max_retries"] == 0, "else Ray itself would run a trial again"

        def task(function: Callable[..., Any]) -> Any:
            def start(*arguments: object) -> int:
                self.started += 1
                self.results[self.started] = lambda: function(*arguments)
                return self.started

            made = SimpleNamespace(remote=start)
            made.options = lambda **_: made
            return made

        return task

    def wait(self, tasks: Sequence[int], num_returns: int, timeout: float) -> tuple[list[int], list[int]]:
        return list(tasks[:num_returns]), list(tasks[num_returns:])

    def get(self, task: int) -> object:
        if task in self.deaths:
            raise RayError("the node died")
        try:
            return self.results[task]()
        except Exception as error:
            raise RayTaskError(error) from error

    def cancel(self, task: int) -> None:
        self.cancelled += 1


def install(monkeypatch: pytest.MonkeyPatch, *cpus: int) -> FakeRay:
    """Put a cluster of nodes with these numbers of processors in place of Ray."""
    ray = FakeRay(*cpus)
    parts: dict[str, dict[str, object]] = {
        "ray.exceptions": {"RayError": RayError, "RayTaskError": RayTaskError},
        "ray.util": {},
        "ray.util.scheduling_strategies": {"NodeAffinitySchedulingStrategy": lambda node, soft: node},
    }
    monkeypatch.setitem(sys.modules, "ray", ray)
    for name, attributes in parts.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    return ray
