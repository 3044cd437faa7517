"""What a robot's commands write where the disk is full, read-only or the reader is gone: one line, and what was there stays."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest

from tests.support.bundled import CONF
from tests.unit.runtime.test_commands import bundle, made, run  # noqa: F401
from tests.unit.runtime.test_switch import files_of_at_most
from yolo_compress.runtime.backends.base import load_info
from yolo_compress.runtime.backends.ort import OrtBackend
from yolo_compress.runtime.commands import bench, build, detect
from yolo_compress.runtime.commands.bundle import Bundle
from yolo_compress.runtime.commands.detect import ShadowLog
from yolo_compress.runtime.detect import draw
from yolo_compress.runtime.detect.stream import ImageDetections
from yolo_compress.runtime.errors import printable
from yolo_compress.runtime.secure.signed_manifest import written

RUNTIME = Path(detect.__file__).parent


ANSWERS = """
import sys
from yolo_compress.runtime.commands.command_line import answer, run_command, say
def action():
    for _ in range(3):
        answer("x" * 100)
    return 0
sys.exit(run_command(action))
"""


def answers(**streams: Any) -> subprocess.CompletedProcess[str]:
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, **streams}
    return subprocess.run([sys.executable, "-c", ANSWERS], text=True, timeout=60, check=False, **streams)


@pytest.mark.fault(82)
def test_a_full_disk_behind_stdout_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = answers(stdout=full)
    assert (done.returncode, done.stderr) == (6, "error: <stdout>: No space left on device\n")
    with open("/dev/full", "w") as full:
        assert answers(stdout=full, stderr=full).returncode == 6


@pytest.mark.fault(12)
def test_a_reader_that_is_gone_is_a_quiet_end() -> None:
    reads, writes = os.pipe()
    os.close(reads)
    try:
        done = answers(stdout=writes)
    finally:
        os.close(writes)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_command_answers_by_it() -> None:
    for file in (file for file in RUNTIME.glob("*.py") if file.name != "command_line.py"):
        assert "print(" not in file.read_text(), file.name


def test_nothing_reaches_a_terminal_raw() -> None:
    assert printable("\x1b]0;x\x07 \u202e\x9b1m\x7f\ud800") == r"\x1b]0;x\x07 \u202e\x9b1m\x7f\ud800"
    assert printable("Blutkörperchen 血\u3000\xa0\n\tkg") == "Blutkörperchen 血\u3000\xa0\n\tkg"


def found(name: str) -> ImageDetections:
    return ImageDetections(name, None, np.array([[1, 2, 30, 40, 0.5, 1]], np.float32), None, 2.0)


@pytest.fixture
def about(tmp_path: Path) -> Bundle:
    return Bundle(tmp_path, {}, "tiny", 3, ("bolt", "nut"), (64, 96), {})


@pytest.mark.fault(83)
def test_a_line_that_the_disk_took_in_part_costs_no_other(
    about: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ShadowLog(tmp_path / "log", about) as log:
        log.write(found("f0"))
        with files_of_at_most((tmp_path / "log").stat().st_size + 50):
            log.write(found("f1"))
            log.write(found("f2"))
        log.write(found("f3"))
    lines = (tmp_path / "log").read_text().splitlines()
    assert [len(line) < 60 for line in lines] == [False, True, False]
    assert [json.loads(line)["frame"] for line in (lines[0], lines[2])] == ["f0", "f3"]
    assert log.lost == 2
    assert capsys.readouterr().err.count("detection continues") == 1


@pytest.mark.fault(63)
def test_a_log_can_be_rotated_under_a_running_detection(about: Bundle, tmp_path: Path) -> None:
    """As logrotate does with `copytruncate`: copied, then cut to nothing; no line is lost and the disk it takes is bounded."""
    log_file, rotated = tmp_path / "log", []
    with ShadowLog(log_file, about) as log:
        for number in range(100):
            log.write(found(f"f{number}"))
            if number % 10 == 9:
                rotated.append(log_file.read_text())
                os.truncate(log_file, 0)
                assert log_file.stat().st_size == 0
    frames = [json.loads(line)["frame"] for text in rotated for line in text.splitlines()]
    assert frames == [f"f{number}" for number in range(100)] and log.lost == 0
    assert not any("\0" in text for text in rotated), "the file begins at 0 again, without a hole"


def test_a_disk_that_became_read_only_does_not_keep_detection_from_starting(
    about: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*arguments: Any, **options: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system", arguments[0])

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", refuses)
        log = ShadowLog(tmp_path / "log", about)
        log.write(found("f0"))
    with log:
        log.write(found("f1"))
    assert log.lost == 1 and json.loads((tmp_path / "log").read_text())["frame"] == "f1"


@pytest.mark.fault(83)
def test_detection_goes_on_without_its_shadow_log(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    assert detect.main([str(bundle / "golden"), "--conf", str(CONF), "--shadow", "/dev/full"], bundle) == 6
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2 and all(json.loads(line)["detections"] for line in out.splitlines())
    assert err.splitlines()[-2:] == [
        "/dev/full: No space left on device; detection continues, these lines of the log are lost",
        "error: /dev/full: 2 lines could not be written",
    ]


def test_a_file_is_replaced_whole_or_stays(tmp_path: Path) -> None:
    (tmp_path / "device.json").write_text("before")
    with files_of_at_most(1000), pytest.raises(OSError, match=r"device\.json"):
        written(tmp_path / "device.json", b"x" * 5000)
    assert (tmp_path / "device.json").read_text() == "before" and len(os.listdir(tmp_path)) == 1
    picture = np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8)
    (tmp_path / "a.jpg").write_text("before")
    with files_of_at_most(1000), pytest.raises(OSError):
        draw.write_drawing(tmp_path / "a.jpg", picture, np.zeros((0, 6), np.float32), ())
    assert (tmp_path / "a.jpg").read_text() == "before" and len(os.listdir(tmp_path)) == 2
    draw.write_drawing(tmp_path / "a.jpg", picture, np.zeros((0, 6), np.float32), ())
    assert (tmp_path / "a.jpg").read_bytes()[:2] == b"\xff\xd8" and len(os.listdir(tmp_path)) == 2


def test_a_place_that_cannot_be_written_is_said_before_the_work(
    bundle: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(bench, "bench", lambda *_: pytest.fail("it was measured"))
    assert bench.main(["--out", "/nowhere/device.json"], bundle) == 6
    assert "/nowhere/device.json: No such file or directory; set --out to a file" in capsys.readouterr().err
    assert bench.main(["--out", "/"], bundle) == 6
    assert "/: Is a directory; set --out to a file" in capsys.readouterr().err
    monkeypatch.setattr(OrtBackend, "build", lambda *_: pytest.fail("it was built"))
    assert build.main(["--out", "/proc/engines", "--runtime", "onnxruntime"], bundle) == 6
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: /proc/engines")


def test_an_engine_that_did_not_fit_leaves_the_one_before(
    bundle: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    engines = bundle / "engines"
    with files_of_at_most(100_000):
        assert run("build", bundle, "--force") == 6
    assert "error: " + str(engines / "onnxruntime-fp32.partial") in capsys.readouterr().err
    assert [entry.name for entry in engines.iterdir()] == ["onnxruntime-fp32"]
    assert load_info(engines / "onnxruntime-fp32").runtime == "onnxruntime" and run("detect", bundle) == 0


def test_an_engine_of_openvino_is_whole(
    bundle: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It raises for a full disk, but no OSError; and of a graph that was cut it need not notice."""
    really = openvino.save_model

    def cut(model: Any, path: str, **options: Any) -> None:
        really(model, path, **options)
        os.truncate(path, os.stat(path).st_size // 2)

    with files_of_at_most(100_000):
        assert build.main(["--runtime", "openvino"], bundle) == 6
    monkeypatch.setattr(openvino, "save_model", cut)
    assert build.main(["--runtime", "openvino"], bundle) == 6
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 2 and all("openvino-fp32.partial/engine.xml: OpenVINO cannot write" in line for line in said)
    assert not (bundle / "engines" / "openvino-fp32.partial").exists()


MODULES = ("commands.detect", "commands.build", "commands.bench", "commands.switch", "measure.layer_times")


@pytest.mark.fault(82)
@pytest.mark.parametrize("module", [*(f"runtime.{name}" for name in MODULES), "data.digits"])
def test_help_on_a_full_disk_is_one_line(module: str) -> None:
    words = ["install", "--help"] if module.endswith("switch") else ["--help"]
    start = f"import sys; from yolo_compress.{module} import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", start, *words]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (6, "error: <stdout>: No space left on device\n")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and done.stdout.startswith("usage: ") and "--help" in done.stdout and not done.stderr
    assert done.stdout.endswith("\n") and not done.stdout.endswith("\n\n")


def test_every_program_has_this_help() -> None:
    """No file of the package but that one takes argparse's parser as it is."""
    package = RUNTIME.parents[1]
    bare = {
        file.name for file in package.rglob("*.py") if "argparse.ArgumentParser" in file.read_text(encoding="utf-8")
    }
    assert bare == {"command_line.py"}
