"""The lock of the machine: trainings run beside each other, a timing runs alone."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.unit.search.test_space import digits
from yolo_compress.data.dataset import Dataset
from yolo_compress.recipe.recipe import BenchConfig
from yolo_compress.search import measure

ROOT = Path(__file__).resolve().parents[3]
HOLD = "from yolo_compress.search import measure; import time\nwith measure.{}(): print('held', flush=True); time.sleep({})"


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLO_COMPRESS_HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def holder(how: str, seconds: float) -> subprocess.Popen[str]:
    """Start a process that holds the machine. It holds it when this returns."""
    child = subprocess.Popen([sys.executable, "-c", HOLD.format(how, seconds)], stdout=subprocess.PIPE, text=True)
    assert child.stdout and child.stdout.readline() == "held\n"
    return child


def test_trainings_run_beside_each_other() -> None:
    with holder("beside_others", 60) as other, measure.beside_others():
        assert other.poll() is None
        other.kill()


@pytest.mark.parametrize(
    ("first", "second"), [("beside_others", "alone"), ("alone", "beside_others"), ("alone", "alone")]
)
def test_a_timing_runs_alone(first: str, second: str) -> None:
    with holder(first, 1.0) as other, getattr(measure, second)():
        assert other.wait(5) == 0, "it waited for the end of the other one"


def test_a_timing_that_waits_comes_before_a_new_training() -> None:
    with holder("beside_others", 2.0) as training:
        timing = subprocess.Popen([sys.executable, "-c", HOLD.format("alone", 0.5)], stdout=subprocess.PIPE, text=True)
        while not measure._gate().is_file() or b"waiting to time" not in measure._gate().read_bytes():
            time.sleep(0.02)
        with measure.beside_others():
            assert timing.wait(5) == 0 and training.wait(5) == 0
        assert timing.stdout
        timing.stdout.close()


def timing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *replies: tuple[float, bool]) -> tuple[measure.Timing, int]:
    """Time an engine that answers with (ms, quiet) in turn. Return the timing and how often the engine was timed."""
    left = list(replies)

    def measured(specs: object, rounds: int, n: int) -> list[dict[str, object]]:
        ms, quiet = left.pop(0)
        return [{"samples_ms": [ms] * 3, "quiet": quiet}]

    monkeypatch.setattr(measure, "measure_in_turn", measured)
    monkeypatch.setattr(measure, "write_inputs", lambda *_: None)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    recipe = digits()
    dataset = Dataset(Path("x.yaml"), ("a",), 3, (), (), (), (), "d" * 64, "t" * 64, "v" * 64)
    found = measure.timed(tmp_path / "onnxruntime-int8", dataset, recipe, BenchConfig(), tmp_path)
    return found, len(replies) - len(left)


def test_a_disturbed_timing_is_done_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert timing(monkeypatch, tmp_path, (5.0, False), (3.0, True), (2.0, True)) == (measure.Timing(3.0, True), 2)


def test_a_machine_that_never_is_quiet_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = timing(monkeypatch, tmp_path, (5.0, False), (3.0, False), (4.0, False))
    assert found == (measure.Timing(3.0, False), 3)
    assert "other programs used the processors while onnxruntime-int8 was timed" in capsys.readouterr().err
