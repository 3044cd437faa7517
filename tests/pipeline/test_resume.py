"""Kill -9 at any moment and run again: the same tensors and metrics as an uninterrupted run, nothing half-written."""

from __future__ import annotations

import json
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.pipeline.conftest import Bench, prepare, recipe
from yolo_compress.files.lock import lock
from yolo_compress.store.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STAGE = {
    "prune": {"epochs": 4, "batch": 8, "keep_flops": 0.7, "calib_images": 8, "teach_from_parent": True},
    "run": {"val_every": 2},
}


@dataclass(frozen=True)
class Whole:
    """What nobody interrupted, and the seconds that it took."""

    bench: Bench
    seconds: float


def ready(folder: Path) -> Bench:
    """All but `prune` of the recipe is done."""
    bench = prepare(folder)
    recipe(bench.folder, "kill", sparsify=None, distill=None, qat=None, **STAGE)
    bench.run("baseline", "recipe=kill.yaml")
    return bench


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    bench, started = ready(tmp_path_factory.mktemp("whole") / "user"), time.monotonic()
    bench.run_apart("prune", "recipe=kill.yaml")
    return Whole(bench, time.monotonic() - started)


def assert_same(found: Bench, expected: Bench) -> None:
    """The same fingerprint, tensors, metrics and rows of every epoch."""
    a, b = (Store(bench.folder / "weights").linked("kill", "prune") for bench in (found, expected))
    assert a is not None and b is not None and a.fingerprint == b.fingerprint
    states = [torch.load(each.file("model.pt"), weights_only=False)["model"].state_dict() for each in (a, b)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert a.metrics == b.metrics
    assert a.file("results.csv").read_text() == b.file("results.csv").read_text()


@pytest.mark.fault(46)
def test_killed_at_random_moments_equals_uninterrupted(whole: Whole, tmp_path: Path) -> None:
    killed = ready(tmp_path / "killed")
    dice = random.Random(20261124)
    for _ in range(3):
        process = killed.start("prune", "recipe=kill.yaml")
        time.sleep(whole.seconds * dice.uniform(0.3, 0.9))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert Store(killed.folder / "weights").linked("kill", "baseline") is not None, "an earlier stage is intact"
    again = killed.run_apart("prune", "recipe=kill.yaml")
    assert "prune: up to date" in again.stderr or "prune: done" in again.stderr
    assert_same(killed, whole.bench)


@pytest.mark.fault(46)
def test_killed_after_the_last_epoch_does_not_train_again(whole: Whole, tmp_path: Path) -> None:
    late = ready(tmp_path / "late")
    process = late.start("prune", "recipe=kill.yaml")
    store = late.folder / "weights" / "store"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        found = list(store.glob("prune-*.partial/work/resume.pt"))
        if found and _epoch(found[0]) == 3:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = late.run_apart("prune", "recipe=kill.yaml")
    assert "epoch 4/4" not in done.stderr
    assert_same(late, whole.bench)


def _epoch(file: Path) -> int:
    try:
        return int(torch.load(file, weights_only=True)["epoch"])
    except (OSError, RuntimeError, EOFError):
        return -1


@pytest.mark.fault(44, 45)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_with_their_code_and_a_hint(bench: Bench, number: signal.Signals, code: int) -> None:
    recipe(bench.folder, "kill", sparsify=None, distill=None, qat=None,
           prune={"epochs": 300, "batch": 8, "keep_flops": 0.7})  # fmt: skip
    process = bench.start("prune", "recipe=kill.yaml")
    store = bench.folder / "weights" / "store"
    deadline = time.monotonic() + 300
    while not list(store.glob("prune-*.partial/work/resume.pt")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    try:
        stdout, stderr = process.communicate(timeout=120)
    finally:
        process.kill()  # one that did not end would train on beside every later test
    assert process.returncode == code and not stdout
    assert "the same command continues where it stopped" in stderr and "Traceback" not in stderr
    assert not [path for path in store.rglob("*") if path.name.startswith(".tmp")]


@pytest.mark.fault(54)
def test_a_second_run_fails_or_waits_for_the_first(bench: Bench) -> None:
    with lock(bench.folder / "weights" / ".lock", "prune of recipe tiny"):
        done = bench.run_apart("baseline", "recipe=tiny.yaml", "lock=fail", code=75)
        assert "prune of recipe tiny" in done.stderr
        waiting = bench.start("baseline", "recipe=tiny.yaml")
        assert waiting.stderr is not None
        assert "prune of recipe tiny" in waiting.stderr.readline()
    _, _ = waiting.communicate(timeout=300)
    assert waiting.returncode == 0
    assert json.loads(bench.run("baseline", "recipe=tiny.yaml").stdout.splitlines()[-1])["stage"] == "baseline"
