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

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.filterwarnings("ignore")  # of Ray, about its own defaults
def test_a_node_that_is_killed_loses_no_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        command = subprocess.Popen(
            [sys.executable, "-m", "tests.support.toy_study", "ray", "toy"],
            env={**os.environ, "RAY_ADDRESS": nodes.address},
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )

        def begun() -> int:
            return sum(one.outcome is None and (one.folder / "runs.txt").is_file() for one in study.trials())

        deadline, both = time.monotonic() + 200, False
        while not both and command.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
            both = begun() == 2
        assert both, command.communicate(timeout=60)
        nodes.remove_node(second, allow_graceful=False)
        _, said = command.communicate(timeout=300)
    finally:
        nodes.shutdown()
    trials = study.trials()
    assert command.returncode == 0 and "its trial is given out again, once" in said, said
    assert [one.number for one in trials] == list(range(6)), "none is lost"
    assert all(one.outcome and one.outcome["state"] == "done" for one in trials), said
    engines = [one["trial"] for one in study.engines(trials) if one["trial"] is not None]
    assert sorted(engines) == list(range(6)), "none is counted twice"
    assert sorted(one.given for one in trials) == [1, 1, 1, 1, 1, 2], (
        "the one of the dead node was given out again, once"
    )
    runs = [(one.folder / "runs.txt").read_text().count("\n") for one in trials]
    assert all(1 <= count <= one.given for count, one in zip(runs, trials, strict=True))
