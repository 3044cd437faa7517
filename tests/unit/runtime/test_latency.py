"""Percentiles that the sample carries, counted calls, engines in turn, and children that die with words. No timings."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support.typed import validate
from yolo_compress.evaluate import torch_latency
from yolo_compress.export.float_onnx import export_onnx
from yolo_compress.runtime.backends.ort import OrtBackend
from yolo_compress.runtime.errors import EngineError, LatencyError
from yolo_compress.runtime.measure import device, latency
from yolo_compress.runtime.measure.interleaved import measure_in_turn
from yolo_compress.runtime.measure.latency import Served, _inputs, measure, percentiles
from yolo_compress.runtime.measure.messages import Measured
from yolo_compress.train import checkpoint

NAMES = ("bolt", "nut")
IMGSZ = (64, 64)


@pytest.mark.fault(68)
@pytest.mark.parametrize(
    ("n", "stated"),
    [
        (0, []),
        (1, [50]),
        (63, [50]),
        (64, [50, 90]),
        (129, [50, 90]),
        (130, [50, 90, 95]),
        (661, [50, 90, 95]),
        (662, [50, 90, 95, 99]),
    ],
)
def test_a_percentile_is_withheld_until_the_sample_carries_it(n: int, stated: list[int]) -> None:
    samples = np.random.default_rng(n).permutation(np.arange(n, dtype=float))
    found = percentiles(list(samples))
    assert found.pop("latency_n") == n
    assert set(found) == {f"latency_p{p}_ms" for p in (50, 90, 95, 99)}
    for percent in (50, 90, 95, 99):
        value = found[f"latency_p{percent}_ms"]
        if percent in stated:
            assert value == pytest.approx((n - 1) * percent / 100), "of 0 .. n-1, between the nearest two"
        else:
            assert value is None


def test_measure_warms_up_then_counts() -> None:
    calls: list[int] = []
    samples = measure(lambda: calls.append(1), 7, warmup_ms=0, warmup_n=3)
    assert samples.shape == (7,) and len(calls) == 10 and (samples >= 0).all()


def test_warmup_goes_on_until_both_limits_are_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    from yolo_compress.runtime.measure import latency

    clock, calls = [0.0], [0]

    def call() -> None:
        clock[0] += 0.010
        calls[0] += 1

    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0])
    samples = measure(call, 4, warmup_ms=95, warmup_n=3)
    assert calls[0] == 10 + 4, "95 ms at 10 ms a call is 10 calls"
    assert np.allclose(samples, 10.0), "ms"
    calls[0] = 0
    measure(call, 4, warmup_ms=15, warmup_n=6)
    assert calls[0] == 6 + 4


def test_calls_are_cycled_and_the_collector_comes_back_even_after_an_error() -> None:
    order: list[str] = []
    calls = [lambda: order.append("a"), lambda: order.append("b")]
    measure(calls[0], 4, 0, 2, calls)
    assert "".join(order) == "ab" + "abab"
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        measure(lambda: 1 / 0, 3, 0, 0)
    assert gc.isenabled()


def backend(batch: int | None = 1) -> Any:
    return SimpleNamespace(
        batch=batch,
        channels=3,
        imgsz=IMGSZ,
        precision="fp32",
        executed="fp32",
        threads=1,
        bind=lambda images: lambda: images.sum(),
    )


def test_inputs_are_real_images_or_say_that_they_are_noise(tmp_path: Path) -> None:
    file = tmp_path / "inputs.npy"
    np.save(file, np.zeros((5, 3, *IMGSZ), np.float32))
    assert [part.shape[0] for part in _inputs(backend(2), str(file))] == [2, 2]
    assert [part.shape[0] for part in _inputs(backend(None), str(file))] == [1] * 5
    assert [part.shape[0] for part in _inputs(backend(None), str(file), 2)] == [2, 2]
    assert Served(backend(), {}).about()["input"] == "noise"
    about = Served(backend(), {"inputs": str(file)}).about()
    assert about["input"] == str(file) and about["images"] == 5 and about["device"]["cpu"]
    with pytest.raises(ValueError, match=r"at least \[8, 3, H, W\]"):
        _inputs(backend(8), str(file))


def test_the_first_round_warms_up_longer() -> None:
    count = [0]

    def bind(images: np.ndarray) -> Any:
        return lambda: count.__setitem__(0, count[0] + 1)

    served = Served(SimpleNamespace(**{**vars(backend()), "bind": bind}), {"warmup_ms": 0, "warmup_n": 100})
    assert len(served.one_round(10)["samples_ms"]) == 10 and count[0] == 110
    assert served.one_round(10)["quiet"] is True


# ---- other programs


STAT = "cpu  100 20 30 4000 50 6 7 8 90 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n"


def test_the_time_of_all_programs_is_without_idle_and_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "read_line", lambda path: {"/proc/stat": STAT.strip()}[path])
    assert device.busy_s() == (100 + 20 + 30 + 6 + 7 + 8) / os.sysconf("SC_CLK_TCK")
    for text in (None, "intr 1 2 3", "cpu 1 2 3", "cpu a b c d e f g h"):
        monkeypatch.setattr(device, "read_line", lambda path, text=text: text)
        assert device.busy_s() is None


@pytest.mark.parametrize(
    ("passed", "all_s", "own_s", "expected"),
    [(2.0, 5.0, 3.0, 1.0), (2.0, 3.0, 3.0, 0.0), (2.0, 2.9, 3.0, 0.0), (0.4, 1.0, 0.1, None), (2.0, None, 3.0, None)],
)
def test_what_other_programs_used(
    monkeypatch: pytest.MonkeyPatch, passed: float, all_s: float | None, own_s: float, expected: float | None
) -> None:
    clocks = {"perf": iter([10.0, 10.0 + passed]), "own": iter([1.0, 1.0 + own_s])}
    totals = iter([50.0, None if all_s is None else 50.0 + all_s])
    monkeypatch.setattr(latency.time, "perf_counter", lambda: next(clocks["perf"]))
    monkeypatch.setattr(latency.time, "process_time", lambda: next(clocks["own"]))
    monkeypatch.setattr(latency, "busy_s", lambda: next(totals))
    found = latency.others_cpus()()
    assert found is None if expected is None else found == pytest.approx(expected)


@pytest.mark.parametrize(("others", "quiet"), [(None, True), (0.2, True), (0.3, False)])
def test_a_round_beside_another_program_is_not_quiet(
    monkeypatch: pytest.MonkeyPatch, others: float | None, quiet: bool
) -> None:
    monkeypatch.setattr(latency, "others_cpus", lambda: lambda: others)
    assert Served(backend(), {"warmup_ms": 0}).one_round(10)["quiet"] is quiet


# ---- processes

CHILD = """
import json, os, sys, time
spec = json.loads(sys.stdin.readline())
if spec["mode"] == "dies at load":
    sys.exit("cannot open the engine: out of luck")
print(json.dumps({"executed": spec["label"], "pid": os.getpid()}), flush=True)
for number, line in enumerate(sys.stdin):
    n = json.loads(line)["n"]
    with open(spec["log"], "a") as log:
        log.write(spec["label"])
    if spec["mode"] == "dies in a round" and number == 1:
        print("x" * 5000 + " last words", end="", file=sys.stderr, flush=True)
        os._exit(3)
    if spec["mode"] == "crashes":
        os.kill(os.getpid(), 11)
    if spec["mode"] == "babbles":
        print("hello", flush=True)
    if spec["mode"] == "hangs":
        time.sleep(60)
    print(json.dumps({"samples_ms": [number + 0.5] * n, "quiet": spec["mode"] != "spins"}), flush=True)
"""


@pytest.fixture
def specs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "fake_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def made(*modes: str) -> list[dict[str, Any]]:
        return [
            {"module": "fake_child", "label": label, "mode": mode, "log": str(tmp_path / "log")}
            for label, mode in zip("ABC", modes, strict=False)
        ]

    return made


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_rounds_go_abba_with_n_samples_each(specs: Any, tmp_path: Path) -> None:
    steps: list[int] = []
    first, second = measure_in_turn(specs("works", "spins"), 4, 3, progress=steps.append)
    assert (tmp_path / "log").read_text() == "ABBAABBA" and steps == [1] * 8
    for result in (first, second):
        assert result["rounds_ms"] == [[r + 0.5] * 3 for r in range(4)]
        assert result["samples_ms"] == [s for samples in result["rounds_ms"] for s in samples]
        assert not alive(result["pid"]), "the process has ended"
    assert (first["executed"], second["executed"]) == ("A", "B"), "in the order of the specs"
    assert first["pid"] != second["pid"]
    assert (first["quiet"], second["quiet"]) == (True, False)


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("dies at load", r"(?s)B: .*ended with code 1.*cannot open the engine: out of luck"),
        ("dies in a round", r"(?s)B: .*ended with code 3.* last words"),
        ("crashes", r"(?s)B: .*ended by signal 11 \(Segmentation fault\)"),
        ("babbles", "B: the measuring process answered 'hello"),
    ],
)
@pytest.mark.fault(53)
def test_a_child_that_fails_is_named_with_its_last_words(specs: Any, mode: str, words: str) -> None:
    with pytest.raises(LatencyError, match=words) as caught:
        measure_in_turn(specs("works", mode), 3, 2)
    assert len(str(caught.value)) < 2500, "the end of a long stderr, not all of it"


@pytest.mark.fault(53)
def test_a_child_that_hangs_is_ended(specs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yolo_compress.runtime.measure.interleaved.PATIENCE_S", 1.5)
    with pytest.raises(LatencyError, match=r"B: the measuring process gave no answer in 1\.5 s and was ended"):
        measure_in_turn(specs("works", "hangs"), 1, 2)


def test_every_child_is_ended_when_one_fails(specs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen

    def spy(*arguments: Any, **options: Any) -> Any:
        started.append(popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", spy)
    with pytest.raises(LatencyError):
        measure_in_turn(specs("works", "works", "dies at load"), 2, 2)
    assert len(started) == 3 and all(process.poll() is not None for process in started)


@pytest.fixture(scope="module")
def model() -> Any:
    return checkpoint.new_model("yolov8n.yaml", NAMES, 3, seed=0).eval()


@pytest.mark.slow  # two processes, one of which imports torch
def test_an_engine_and_torch_in_turn(model: Any, tmp_path: Path) -> None:
    export_onnx(model, tmp_path / "fp32.onnx", IMGSZ, names=NAMES)
    OrtBackend.build(tmp_path / "fp32.onnx", tmp_path / "engine", "fp32")
    np.save(tmp_path / "inputs.npy", np.zeros((2, 3, *IMGSZ), np.float32))
    options: dict[str, Any] = {"inputs": str(tmp_path / "inputs.npy"), "quick": True}
    described = [
        {"engine": str(tmp_path / "engine"), "threads": 1, "label": "ort", **options},
        torch_latency.spec(model, NAMES, IMGSZ, tmp_path, threads=1, label="torch", **options),
    ]
    for result in measure_in_turn(described, 2, 5):
        validate(result, Measured)
        assert len(result["samples_ms"]) == 10 and min(result["samples_ms"]) > 0
        assert (result["executed"], result["threads"], result["images"]) == ("fp32", 1, 2)
        assert result["imgsz"] == list(IMGSZ)


def test_one_engine_by_command_line_and_an_altered_one(model: Any, tmp_path: Path) -> None:
    export_onnx(model, tmp_path / "fp32.onnx", IMGSZ, names=NAMES, simplify=False)
    OrtBackend.build(tmp_path / "fp32.onnx", tmp_path / "engine", "fp32")
    spec = {"engine": str(tmp_path / "engine"), "threads": 1, "n": 4, "quick": True}
    command = [sys.executable, "-m", "yolo_compress.runtime.measure.latency", json.dumps(spec)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    assert answer["latency_n"] == 4 and answer["latency_p50_ms"] > 0 and answer["latency_p99_ms"] is None
    assert answer["input"] == "noise"
    (tmp_path / "engine" / "engine.onnx").write_bytes(b"something else")
    with pytest.raises(LatencyError, match=r"(?s)EngineError.*build the engine again"):
        measure_in_turn([spec], 2, 2)


def test_a_torch_module_is_unpickled_only_if_unchanged(model: Any, tmp_path: Path) -> None:
    described = torch_latency.spec(model, NAMES, IMGSZ, tmp_path)
    with torch_latency.open_spec(described) as opened:
        assert opened.names == NAMES
    with Path(described["checkpoint"]).open("ab") as stream:
        stream.write(b"!")
    with pytest.raises(EngineError, match="not loaded"):
        torch_latency.open_spec(described)
