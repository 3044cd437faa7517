"""The folder for results: the working directory or YOLO_COMPRESS_HOME, and the error if neither can be written."""

from __future__ import annotations

import errno
import os
from contextlib import nullcontext
from pathlib import Path

import pytest

from yolo_compress import home, pipeline
from yolo_compress.cli.main import main
from yolo_compress.errors import EnvironmentLacks, StorageError
from yolo_compress.files.atomic import storage_errors
from yolo_compress.store.source_weights import find_weights


@pytest.fixture(autouse=True)
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and YOLO_COMPRESS_HOME is not set."""
    for name in ("YOLO_COMPRESS_DATA", "YOLO_COMPRESS_WEIGHTS", home.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("value", "folder"), [(None, "."), ("", "."), ("there", "there"), ("~/there", "/me/there")])
def test_the_two_folders(value: str | None, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/me")
    if value is not None:
        monkeypatch.setenv(home.VARIABLE, value)
    assert (home.weights(), home.datasets()) == (Path(folder) / "weights", Path(folder) / "datasets")


def test_weights_are_looked_for_in_the_home(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("weights", "home/weights"):
        (user / folder).mkdir(parents=True)
        (user / folder / f"{len(folder)}.pt").touch()
    assert find_weights("7.pt") == Path("weights/7.pt")
    monkeypatch.setenv(home.VARIABLE, str(user / "home"))
    assert find_weights("12.pt") == user / "home/weights/12.pt"
    with pytest.raises(EnvironmentLacks, match=f"put it into {user}/home/weights/"):
        find_weights("7.pt")


def test_the_store_is_in_the_home(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(home.VARIABLE, "home")
    assert main(["gc"]) == 0
    assert [path.name for path in user.iterdir()] == ["home"] and (user / "home/weights/.lock").is_file()


@pytest.mark.fault(56)
@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
@pytest.mark.parametrize(
    "words",
    [("run", "recipe=digits"), ("status", "recipe=digits"), ("gc",), ("fetch", "digits"), ("fetch", "yolov8n.pt")],
)
def test_a_folder_that_cannot_be_written_is_an_error_with_the_remedy(
    words: tuple[str, ...], code: int, user: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: str, *rest: object) -> None:
        raise OSError(code, os.strerror(code), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", refuse)
        assert main(words) == StorageError.exit_code
    error = capsys.readouterr().err
    assert error.startswith("error: cannot ") and os.strerror(code) in error and error.count("\n") == 1
    assert "set YOLO_COMPRESS_HOME to a folder that can be written" in error
    assert not list(user.iterdir())


def test_a_home_that_is_a_file(user: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (user / "file").touch()
    monkeypatch.setenv(home.VARIABLE, "file")
    assert main(["gc"]) == StorageError.exit_code
    assert "file/weights/.lock: Not a directory" in capsys.readouterr().err


def test_a_probe_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(job: object, weights: object, folder: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder))

    monkeypatch.setattr(pipeline, "_planning", lambda recipe, store: nullcontext((None, None)))
    monkeypatch.setattr("yolo_compress.stages._prune_plan.probe", refuse)
    assert main(["probe", "recipe=digits", "out=p"]) == StorageError.exit_code
    assert capsys.readouterr().err == "error: cannot write p: Read-only file system\n"


@pytest.mark.parametrize(
    ("path", "action"), [("out.json", "write"), ("weights.json", "write"), ("weights/n.pt", "read")]
)
def test_the_remedy_is_not_given_for_files_outside_the_home(path: str, action: str) -> None:
    with pytest.raises(StorageError) as caught, storage_errors(Path(path), action):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    assert home.VARIABLE not in str(caught.value)
