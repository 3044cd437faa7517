"""A search on a local Ray cluster of two nodes, with toy trials."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.pipeline.conftest import ROOT
from tests.support import toy_study as toy
from yolo_compress.search.study import Study, Trial

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def runs(trial: Trial) -> int:
    """How often the process of a trial was started."""
    file = trial.folder / "runs.txt"
    return file.read_text().count("\n") if file.is_file() else 0


def begin(study: Study, address: str, folder: Path, starts: int) -> subprocess.Popen[str]:
    """Start the command for the `starts`th time, and wait until two trials run."""
    command = subprocess.Popen(
        [sys.executable, "-m", "tests.support.toy_study", "ray", study.name],
        env={**os.environ, "RAY_ADDRESS": address},
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline, both = time.monotonic() + 200, False
    while not both and command.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
        both = sum(runs(one) == starts for one in study.trials() if one.outcome is None) == 2
    assert both, command.communicate(timeout=60)
    return command


@pytest.mark.filterwarnings("ignore")  # of Ray, about its own defaults
def test_a_signal_gives_trials_back_and_a_killed_node_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="ray is not installed (pip install 'yolo-compress[ray]')")
    from ray.cluster_utils import Cluster

    for name, value in {
        "YOLO_COMPRESS_HOME": str(tmp_path), "PYTHONPATH": str(ROOT), toy.SECONDS: "4", "RAY_USAGE_STATS_ENABLED": "0",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    study = toy.study(tmp_path, "toy", ("search.trials", "6"), ("search.workers", "ray"), ("run.threads", "1"))
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        second = nodes.add_node(num_cpus=1)
        command = begin(study, nodes.address, tmp_path, 1)
        command.terminate()
        _, said = command.communicate(timeout=120)
        assert command.returncode == 143, said
        assert [one.given for one in study.trials() if one.outcome is None] == [0, 0], "both were given back"
        earlier = {one.number: runs(one) for one in study.trials()}

        command = begin(study, nodes.address, tmp_path, 2)
        nodes.remove_node(second, allow_graceful=False)
        _, said = command.communicate(timeout=300)
    finally:
        nodes.shutdown()
    trials = study.trials()
    assert command.returncode == 0 and "its trial is given out again, once" in said, said
    assert [one.number for one in trials] == list(range(6)), "none is lost"
    assert [one.outcome and one.outcome["state"] for one in trials] == ["done"] * 6, said
    engines = [one["trial"] for one in study.engines(trials) if one["trial"] is not None]
    assert sorted(engines) == list(range(6)), "none is counted twice"
    assert sorted(one.given for one in trials) == [1, 1, 1, 1, 1, 2], (
        "the one of the dead node was given out again, once"
    )
    assert all(1 <= runs(one) - earlier.get(one.number, 0) <= one.given for one in trials)
