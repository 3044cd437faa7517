"""Exit codes: 70 and a traceback for a bug, 6 and one line for a full disk, nothing if the reader closed the output."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from yolo_compress import exits, progress
from yolo_compress.cli import cfg, grammar, keygen, main
from yolo_compress.errors import DataError, StorageError, Terminated
from yolo_compress.files import atomic
from yolo_compress.files.atomic import storage_errors
from yolo_compress.runtime.detect.sources import open_source
from yolo_compress.runtime.errors import SourceError


def ended(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException) -> tuple[int, str]:
    """Return exit code and stderr of `yolo-compress cfg` if its work raises `error`."""

    def raises(command: grammar.Command) -> int:
        raise error

    monkeypatch.setattr(cfg, "handle", raises)
    code = main.main(["cfg"])
    out, err = capsys.readouterr()
    assert not out
    return code, err


@pytest.mark.fault(90)
@pytest.mark.parametrize(
    "error",
    [
        KeyError("width"),
        AssertionError(),
        ValueError("x"),
        TypeError("x"),
        BrokenPipeError(errno.EPIPE, "a child died"),
    ],
)
def test_a_bug_is_70_with_a_traceback_and_where_to_report_it(monkeypatch, capsys, error: Exception) -> None:
    code, err = ended(monkeypatch, capsys, error)
    assert code == 70
    assert "Traceback" in err and "in raises" in err and type(error).__name__ in err
    assert err.splitlines()[-1].startswith("error: this is a bug in yolo-compress") and "report it" in err


@pytest.mark.fault(90)
@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (DataError("set.yaml: empty"), 3, "error: set.yaml: empty"),
        (MemoryError(), 4, "memory is used up"),
        (ModuleNotFoundError("No module named 'openvino'", name="openvino"), 4, "openvino does not import"),
        (OSError(errno.ENOSPC, "full"), 6, "No space left on device; "),
        (FileNotFoundError(errno.ENOENT, "gone", "set/1.png"), 6, "cannot use set/1.png: No such file or directory"),
        (PermissionError(errno.EACCES, "no", "weights/x"), 6, "cannot use weights/x: Permission denied"),
        (KeyboardInterrupt(), 130, "interrupted; the same command continues"),
        (Terminated(), 143, "terminated; the same command continues"),
    ],
)
def test_an_error_that_a_user_can_correct_is_one_line(
    monkeypatch, capsys, error: BaseException, code: int, says: str
) -> None:
    got, err = ended(monkeypatch, capsys, error)
    assert got == code and says in err
    assert len(err.splitlines()) == 1 and "Traceback" not in err


def test_a_verb_that_starts_anew_does_not_say_that_it_continues(monkeypatch, capsys) -> None:
    """The same holds for a wrong command line: nothing was started."""

    def ends(command: grammar.Command) -> int:
        raise Terminated

    monkeypatch.setattr(keygen, "handle", ends)
    assert main.main(["keygen", "out=key"]) == 143
    assert capsys.readouterr().err == "terminated\n"
    monkeypatch.setattr(grammar, "parse", ends)
    assert main.main(["cfg"]) == 143
    assert capsys.readouterr().err == "terminated\n"


def test_the_verbs_that_start_anew() -> None:
    """A stage continues from its checkpoint, and fetch from the bytes it has. These verbs start again."""
    anew = {name for name, row in grammar.VERBS.items() if not row.continues}
    assert anew == {"init", "predict", "ab", "cascade", "lint", "keygen", "rollout"}


@pytest.mark.parametrize(
    "words", ["[enforce fail at inline_container.cc] PytorchStreamWriter failed", "4096 requested and 0 written"]
)
def test_a_full_disk_is_recognised_behind_a_librarys_error(monkeypatch, capsys, tmp_path: Path, words: str) -> None:
    for free, seen in ((0, StorageError), (10 << 20, RuntimeError)):
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr(atomic.shutil, "disk_usage", lambda folder, usage=usage: usage)
        with pytest.raises(seen, match=words.split()[-1]), storage_errors(tmp_path / "net.pt"):
            raise RuntimeError(words)
        code, err = ended(monkeypatch, capsys, RuntimeError(words))
        assert code == (70 if free else 6)
        assert free or "No space left on device (RuntimeError: " in err


def test_a_bug_on_a_full_disk_is_still_a_bug(monkeypatch, capsys) -> None:
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 0}))
    assert ended(monkeypatch, capsys, KeyError("width"))[0] == 70


def test_a_file_over_the_limit_of_its_size_is_not_told_to_make_room(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught, storage_errors(tmp_path / "net.pt"):
        raise OSError(errno.EFBIG, "big")
    assert "ulimit -f" in str(caught.value) and "make room" not in str(caught.value)


WRITES = """
import sys
from yolo_compress import progress
from yolo_compress.cli import cfg, main
def verb(command):
    for number in range(401):
        if not progress.result(f'{{"picture": {number}}}'):
            break
    return 0
cfg.handle = verb
sys.exit(main.main(["cfg"]))
"""


def run_writes(stdout, before: str = "") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-c", before + WRITES], stdout=stdout, stderr=subprocess.PIPE, timeout=60)


@pytest.mark.fault(82)
def test_results_on_a_full_disk_end_with_6() -> None:
    with open("/dev/full", "wb") as full:
        done = run_writes(full)
    assert done.returncode == 6
    assert done.stderr.decode() == "error: cannot write stdout: No space left on device; the output is cut short\n"


@pytest.mark.fault(82)
def test_results_in_a_file_over_its_limit_end_with_6(tmp_path: Path) -> None:
    with open(tmp_path / "lines.jsonl", "wb") as file:
        done = run_writes(file, "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))\n")
    assert done.returncode == 6 and b"File too large" in done.stderr and b"Traceback" not in done.stderr
    assert (tmp_path / "lines.jsonl").stat().st_size == 200


@pytest.mark.fault(12)
def test_a_reader_that_left_ends_the_output_quietly() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = run_writes(write_end)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_broken_pipe_is_quiet_only_where_it_is_our_reader_that_left(monkeypatch) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert exits.explain(BrokenPipeError(errno.EPIPE, "x"), True) == 0


def test_escape_sequences_of_a_file_reach_no_terminal(capsys) -> None:
    text = "\x1b[31mOrin\x1b]0;mine\x07\r\x9b2J \u202eabc\ttab\nline é 図"
    progress.notice(text)
    progress.result(text)
    with progress.bar(text, 1) as advance:
        advance()
    out, err = capsys.readouterr()
    shown = "\\x1b[31mOrin\\x1b]0;mine\\x07\\r\\x9b2J \\u202eabc\ttab\nline é 図"
    assert out == shown + "\n" and err.startswith(shown + "\n" + shown + ": 1/1")


def test_torchs_writers_do_not_end_the_process_on_a_full_disk(tmp_path: Path) -> None:
    """They write to memory first, because torch's own writer throws in a destructor. The old file stays."""
    script = """
import resource, sys
from pathlib import Path
import torch
from yolo_compress.errors import StorageError
from yolo_compress.evaluate import torch_latency
from yolo_compress.export.float_onnx import save_torchscript
net = torch.nn.Linear(100, 100)
traced = torch.jit.trace(net, torch.zeros(1, 100))
folder = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for write in (lambda: save_torchscript(traced, folder / "n.torchscript", {}), lambda: torch_latency.spec(net, ["a"], (64, 64), folder)):
    try:
        write()
    except StorageError as error:
        print(error)
"""
    (tmp_path / "n.torchscript").write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line.partition(": ")[2][:14] for line in done.stdout.splitlines()] == ["File too large"] * 2
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("n.torchscript", b"old")]


LONG = "9" * 5000  # Python refuses to read it as a number


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["keygen", "out=."], 2, "is a folder; give the name of a file"),
        (["keygen", "out=/"], 2, "is a folder; give the name of a file"),
        (["predict", "source=a", "engine=b", f"engines={LONG}"], 2, "expected a whole number from 1 to 64"),
        (["ab", "a=a", "b=b", "data=c", f"imgsz={LONG}"], 2, "expected one side or height,width"),
        (["bundle", "recipe=digits", "out=x", f"golden={LONG}"], 2, "expected a whole number >= 1"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_numbers_without_end_and_folders_for_files(monkeypatch, capsys, tmp_path: Path, argv, code, says) -> None:
    monkeypatch.chdir(tmp_path)
    assert main.main(argv) == code
    err = capsys.readouterr().err
    assert says in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_camera_of_5000_digits_is_no_camera() -> None:
    with pytest.raises(SourceError, match="name too long"):
        open_source(LONG)


@pytest.mark.fault(82)
@pytest.mark.parametrize(
    "words", ["", "--help", "--version", "help prune", "prune --help --all", "cfg recipe=digits", "check", "gc"]
)
def test_no_verb_ends_with_0_on_a_full_disk(tmp_path: Path, words: str) -> None:
    command = [sys.executable, "-m", "yolo_compress", *words.split()]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=60, cwd=tmp_path, check=False)
    assert done.returncode == 6
    assert done.stderr.decode() == "error: cannot write stdout: No space left on device; the output is cut short\n"
