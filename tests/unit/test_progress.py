"""Progress output: readable in a log, live on a terminal, silent if turned off. It never ends a run."""

import os
import pty
import subprocess
import sys
from types import SimpleNamespace

import pytest

from yolo_compress import progress


class Clock:
    """A clock that advances only on command."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=clock.monotonic))
    monkeypatch.delenv("YOLO_COMPRESS_PROGRESS", raising=False)
    return clock


def test_plain_lines_come_each_tenth_with_fields_and_times(clock: Clock, capsys) -> None:
    with progress.bar("sparsify", 25, "epochs") as advance:
        for epoch in range(25):
            clock.now += 4
            advance(box=1.23456 / (epoch + 1), kd=0.5, lr="warm")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "sparsify: 3/25 epochs (12%), 0:12 elapsed, 1:28 left  box=0.4115 kd=0.5 lr=warm"
    assert len(lines) == 9
    assert lines[-1] == "sparsify: 25/25 epochs (100%), 1:40 elapsed  box=0.04938 kd=0.5 lr=warm"


def test_a_short_bar_writes_its_last_line_alone(clock: Clock, capsys) -> None:
    with progress.bar("read", 100, "images") as advance:
        for _ in range(100):
            clock.now += 0.009
            advance()
    assert capsys.readouterr().err.splitlines() == ["read: 100/100 images (100%), 0:01 elapsed"]


def test_slow_steps_are_shown_each_and_fast_ones_are_not(clock: Clock, capsys) -> None:
    with progress.bar("val", 1000) as advance:
        for _ in range(4):
            clock.now += 11
            advance()
        advance(5)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"val: {n}/1000 ({n / 1000:.0%})" for n in (1, 2, 3, 4, 9)]
    assert "3:02:58 left" in lines[1]  # 998 steps of 11 s


def test_inner_bars_write_only_if_no_other_line_was_written(clock: Clock, capsys) -> None:
    with progress.bar("train", 2, "epochs") as epochs:
        for _ in range(2):
            with progress.bar("batches", 100) as batches:
                for _ in range(100):
                    clock.now += 0.25
                    batches()
            epochs()
    lines = [line.split(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "train / batches: 40/100 (40%)",
        "train / batches: 80/100 (80%)",
        "train: 1/2 epochs (50%)",
        "train / batches: 40/100 (40%)",
        "train / batches: 80/100 (80%)",
        "train: 2/2 epochs (100%)",
    ]


def test_a_resumed_loop_estimates_from_its_own_steps(clock: Clock, capsys) -> None:
    with progress.bar("qat", 10, done=6) as advance:
        clock.now += 30
        advance()
    assert capsys.readouterr().err == "qat: 7/10 (70%), 0:30 elapsed, 1:30 left\n"


def test_an_empty_loop_and_an_early_end_are_fine(clock: Clock, capsys) -> None:
    with progress.bar("nothing", 0):
        pass
    with pytest.raises(KeyError), progress.bar("fails", 100) as advance:
        advance()
        raise KeyError
    assert capsys.readouterr().err == ""
    with progress.bar("unknown length", 0) as advance:
        advance()
    assert capsys.readouterr().err == "unknown length: 1/0, 0:00 elapsed\n"


def test_off_silences_all_but_notices_and_results(monkeypatch, capsys) -> None:
    monkeypatch.setenv("YOLO_COMPRESS_PROGRESS", "off")
    progress.say("prune: up to date")
    with progress.bar("x", 1) as advance:
        advance(loss=1.0)
    progress.notice("waiting")
    progress.result("{}")
    assert tuple(capsys.readouterr()) == ("{}\n", "waiting\n")


SCRIPT = """
import sys
from yolo_compress import progress
with progress.bar("sparsify [b]", 3, "epochs") as epochs:
    for _ in range(3):
        with progress.bar("batches", 5) as batches:
            for _ in range(5):
                batches(box=1.25)
        progress.say("said [red]so[/red]")
        epochs(kd=0.5)
progress.result("{}")
print("rich" in sys.modules, file=sys.__stdout__)
"""


def run(stdout, stderr) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "150"}
    environment.pop("YOLO_COMPRESS_PROGRESS", None)
    return subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=stdout, stderr=stderr, env=environment)


@pytest.mark.fault(12)
def test_no_terminal_gives_plain_text_without_rich() -> None:
    process = run(subprocess.PIPE, subprocess.PIPE)
    out, err = process.communicate(timeout=20)
    assert out.decode().splitlines() == ["{}", "False"]
    assert b"\x1b" not in err and b"\r" not in err
    assert err.decode().splitlines().count("said [red]so[/red]") == 3
    assert err.decode().splitlines()[-1].startswith("sparsify [b]: 3/3 epochs (100%), 0:00 elapsed  kd=0.5")


def test_a_terminal_gets_bars_with_fields() -> None:
    ours, theirs = pty.openpty()
    process = run(subprocess.PIPE, theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # Linux: the other side is closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert out.decode().splitlines() == ["{}", "True"]
    for text in (b"sparsify [b]", b"epochs", b"kd=0.5", b"3/3", b"said [red]so[/red]", b"left"):
        assert text in shown, (text, shown)
    assert b"Traceback" not in shown


@pytest.mark.fault(12)
@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_reader_that_closed_the_output_is_not_an_error(closed: str) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    process = run(*((write_end, subprocess.PIPE) if closed == "stdout" else (subprocess.PIPE, write_end)))
    os.close(write_end)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert b"Traceback" not in (out or b"") + (err or b"") and b"BrokenPipe" not in (err or b"")


@pytest.mark.fault(12)
def test_a_terminal_that_was_closed_is_not_an_error() -> None:
    ours, theirs = pty.openpty()
    process = run(subprocess.PIPE, theirs)
    os.close(ours)
    os.close(theirs)
    process.communicate(timeout=20)
    assert process.returncode == 0
