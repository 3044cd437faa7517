"""Trials as tasks of a Ray cluster: how many run at a time, which nodes are refused, and what a task that dies costs.

A stand-in has Ray's place. `tests/pipeline/test_search_ray.py` kills a node of a real cluster.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.support import fake_ray
from tests.support import toy_study as toy
from yolo_compress import __version__
from yolo_compress.cli.main import main
from yolo_compress.errors import CompressError, EnvironmentLacks, RecipeError, Terminated
from yolo_compress.home import VARIABLE
from yolo_compress.search import cluster
from yolo_compress.search.cluster import MARK, Needs, Place, entered, needs
from yolo_compress.search.study import Study, open_study


@pytest.fixture
def study(home: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """A study whose baseline is measured. Its tasks run in this process, which holds the lock of the mark itself."""
    made = toy.study(home, "toy", ("search.trials", "4"), ("search.workers", "ray"), ("run.threads", "1"))
    toy.measure_reference(made)
    monkeypatch.setattr(cluster, "entered", lambda place: open_study(place.study, place.overrides))
    monkeypatch.setattr(cluster, "POLL_S", 0)
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    return made


def runs(study: Study) -> Counter[int]:
    return Counter({one.number: (one.folder / "runs.txt").read_text().count("\n") for one in study.trials()})


def test_without_ray_nothing_starts(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else find(name))
    monkeypatch.setattr("yolo_compress.search.sampler.require", lambda: None)
    assert main(["search", "study=x", "recipe=digits", "search.workers=ray"]) == 4
    said = capsys.readouterr().err
    assert "ray is not installed, and search.workers=ray needs it: pip install 'yolo-compress[ray]'" in said
    assert not (home / "searches").exists() and not (home / "datasets").exists()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), Needs(2, 0)),  # the smallest node that has any
        ((("run.threads", "3"),), Needs(3, 0)),
        ((("run.device", "0"),), Needs(1, 1)),
        ((("search.runtime", "tensorrt"), ("run.threads", "2")), Needs(2, 1)),
    ],
)
def test_what_a_task_reserves(home: Path, overrides: tuple[tuple[str, str], ...], expected: Needs) -> None:
    nodes = [{"CPU": 2.0}, {"CPU": 8.0, "GPU": 2.0}, {"GPU": 1.0}]
    assert needs(toy.base(home, *overrides), nodes) == expected


def test_how_many_tasks_fit_on_a_node() -> None:
    node = {"CPU": 8.0, "GPU": 2.0}
    assert [Needs(1, 0).fit(node), Needs(3, 0).fit(node), Needs(1, 1).fit(node), Needs(5, 1).fit(node)] == [8, 2, 2, 1]


@pytest.mark.parametrize(
    ("knob", "value", "lacks"), [("run.threads", "9", "9 CPUs for"), ("run.device", "0", "1 CPU and a GPU for")]
)
def test_a_cluster_without_room_is_refused(home: Path, knob: str, value: str, lacks: str) -> None:
    with pytest.raises(EnvironmentLacks, match=f"no node of the Ray cluster has {lacks}"):
        needs(toy.base(home, (knob, value)), [{"CPU": 8.0}])


def test_all_trials_run_once(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = fake_ray.install(monkeypatch, 1, 1, 0)
    choice = cluster.run(study, toy.instant)
    assert runs(study) == {0: 1, 1: 1, 2: 1, 3: 1} and choice == study.choice(study.trials())
    assert ray.inits == 0 and os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_a_task_that_dies_is_followed_by_another(
    study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ray = fake_ray.install(monkeypatch, 2)
    ray.deaths = {2, 4}  # the first task is the check of the node
    cluster.run(study, toy.instant)
    assert runs(study) == {0: 1, 1: 1, 2: 1, 3: 1}
    assert (
        capsys.readouterr().err.count("a task of the cluster died (RayError); its trial is given out again, once") == 2
    )


def test_a_cluster_whose_tasks_all_die_ends(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = fake_ray.install(monkeypatch, 2)
    ray.deaths = set(range(2, 100))
    with pytest.raises(CompressError, match="7 tasks of the Ray cluster died in a row"):
        cluster.run(study, toy.instant)
    assert ray.cancelled == 1 and ray.inits == 0, "the other task that was started"


def test_an_error_of_a_task_ends_the_search_and_the_other_tasks(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = fake_ray.install(monkeypatch, 3)

    def refused(study: Study) -> toy.Instant:
        raise RecipeError("the study measures latencies on Z80")

    with pytest.raises(RecipeError, match="latencies on Z80") as raised:
        cluster.run(study, refused)
    assert ray.cancelled == 2
    assert isinstance(raised.value.__cause__, fake_ray.RayTaskError), "it has the traceback of the task"


def test_sigterm_ends_a_command_that_waits_for_ray(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray drops every exception of a signal's handler but KeyboardInterrupt."""
    ray = fake_ray.install(monkeypatch, 2)

    def wait(*_: object, **__: object) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            monkeypatch.setattr(ray, "wait", lambda *_, **__: ([], []))
            raise
        except BaseException:
            pass
        raise AssertionError("dropped")

    monkeypatch.setattr(ray, "wait", wait)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated):
        cluster.run(study, toy.instant)
    assert ray.cancelled == 2 and ray.inits == 0 and signal.getsignal(signal.SIGTERM) == before


def test_what_a_task_takes_along(study: Study, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"YOLO_COMPRESS_DATA": "/data", "OMP_WAIT_POLICY": "passive", "OTHER": "1"}.items():
        monkeypatch.setenv(name, value)
    found = dict(cluster._variables())
    assert found["YOLO_COMPRESS_DATA"] == "/data" and found["OMP_WAIT_POLICY"] == "passive" and "OTHER" not in found
    assert Path(found[VARIABLE]).is_absolute()


def test_nodes_with_two_processors_are_refused_before_any_trial(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ray.install(monkeypatch, 1, 1)
    names = iter(("6502", "Z80"))
    monkeypatch.setattr(cluster, "processor", lambda runtime: next(names))
    with pytest.raises(RecipeError, match=r"different processors, .*\(\S+ has 6502, \S+ has Z80\): search on nodes"):
        cluster.run(study, toy.instant)
    assert study.trials() == []


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ImportError("no module"),
            r"cannot run yolo-compress \(no module\): install it there, with the extra ray",
        ),
        (EnvironmentLacks("the folder"), "^the folder$"),
    ],
)
def test_a_node_that_fails_the_check(
    study: Study, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    fake_ray.install(monkeypatch, 1)

    def fails(place: Place) -> Study:
        raise error

    monkeypatch.setattr(cluster, "entered", fails)
    with pytest.raises(EnvironmentLacks, match=message):
        cluster.run(study, toy.instant)
    assert study.trials() == []


def test_a_cluster_that_cannot_be_reached(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = fake_ray.install(monkeypatch, 1)

    def unreachable(**_: object) -> None:
        raise ConnectionError("server:\n  traceback\nno route\n")

    monkeypatch.setattr(ray, "init", unreachable)
    monkeypatch.setenv("RAY_ADDRESS", "ray://far:10001")
    with pytest.raises(
        EnvironmentLacks, match=r"the Ray cluster \(RAY_ADDRESS=ray://far:10001\) cannot be reached: no route"
    ):
        cluster.run(study)


def test_the_end_of_the_time_ends_the_command(home: Path, monkeypatch: pytest.MonkeyPatch, study: Study) -> None:
    over = toy.study(home, "toy", ("search.trials", "4"), ("search.workers", "ray"), ("search.hours", "1e-9"))
    ray = fake_ray.install(monkeypatch, 2)
    cluster.run(over, toy.instant)
    assert over.trials() == [] and ray.started == 2  # the check, and one task on the whole node


class TestFolder:
    """A task has to see the files that the command wrote, and the lock that it holds."""

    @pytest.fixture
    def place(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
        toy.study(home)
        monkeypatch.setenv(VARIABLE, "elsewhere")  # as in a node's own shell
        return Place(
            ((VARIABLE, str(home)), ("GOMP_SPINCOUNT", "7")), str(home), "toy", (("run.threads", "1"),), __version__
        )

    def test_a_shared_one_is_entered(self, home: Path, place: Place) -> None:
        with (home / "searches" / "toy" / MARK).open("w") as mark:
            fcntl.flock(mark, fcntl.LOCK_SH)  # as the command does in its own process
            study = entered(place)
        assert study.name == "toy" and study.base.run.threads == 1
        assert os.environ.pop("GOMP_SPINCOUNT") == "7"

    def test_no_folder(self, home: Path, place: Place) -> None:
        with pytest.raises(
            EnvironmentLacks, match="does not have the study's files: searches/, weights/ and datasets/ have to be"
        ):
            entered(place)

    def test_a_copy(self, home: Path, place: Place) -> None:
        (home / "searches" / "toy" / MARK).touch()
        with pytest.raises(EnvironmentLacks, match="is a copy, or locks of this file system work on one machine only"):
            entered(place)

    def test_another_version(self, place: Place) -> None:
        with pytest.raises(
            EnvironmentLacks, match=f"has yolo-compress {__version__}, the command is of 9: install the same version"
        ):
            entered(place._replace(version="9"))

    def test_another_working_directory(self, place: Place) -> None:
        with pytest.raises(
            EnvironmentLacks, match="/nowhere: No such file or directory: the working directory and searches/"
        ):
            entered(place._replace(folder="/nowhere"))
