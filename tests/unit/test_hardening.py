"""No installs, no network and no code from files, whatever the user's environment says."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.noise_set import noise_set
from yolo_compress.cli.main import main
from yolo_compress.nets import hardening
from yolo_compress.train import checkpoint


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What was asked of the network; a proxy is set."""
    asked: list[Any] = []

    def refuse(*arguments: Any, **options: Any) -> Any:
        asked.append(arguments)
        raise OSError(101, "Network is unreachable")

    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    yield asked


@pytest.mark.fault(60)
@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("baseline.weights=yolov8l.pt", ", or run `yolo-compress fetch yolov8l.pt` on a machine with a network"),
        ("baseline.pretrained=yolov8l.pt", ", or run `yolo-compress fetch yolov8l.pt` on a machine with a network"),
        ("baseline.weights=mine.pt", ""),
    ],
)
def test_weights_that_are_not_here_are_named_and_not_asked_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    no_network: list[Any],
    word: str,
    hint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    noise_set(tmp_path, train=2, val=1)
    assert main(["baseline", "recipe=custom", "data.yaml=set.yaml", word]) == 4
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith(
        f"no such checkpoint here, in weights/ or in YOLO_COMPRESS_WEIGHTS; put it into weights/{hint}"
    )
    assert no_network == []


@pytest.mark.fault(60)
def test_a_model_and_its_checkpoint_are_made_without_a_network(tmp_path: Path, no_network: list[Any]) -> None:
    checkpoint.save_model(checkpoint.new_model("yolov8n.yaml", ["bolt"], 3, 0), tmp_path / "yolov8n.pt")
    checkpoint.load_model(tmp_path / "yolov8n.pt")
    assert no_network == []


@pytest.mark.fault(61)
@pytest.mark.parametrize("given", [None, "true", "1"])
def test_nothing_is_installed_whatever_the_user_set(monkeypatch: pytest.MonkeyPatch, given: str | None) -> None:
    for name in hardening.SETTINGS:
        monkeypatch.delenv(name) if given is None else monkeypatch.setenv(name, given)
    monkeypatch.setenv("ULTRALYTICS_SAFE_LOAD", "1")  # it is imported here
    hardening.harden()
    assert {name: os.environ[name] for name in hardening.SETTINGS} == hardening.SETTINGS
    from ultralytics.utils import AUTOINSTALL, checks

    assert AUTOINSTALL is False

    def install(*arguments: Any, **options: Any) -> Any:
        pytest.fail(f"{arguments} was run")

    for call in ("run", "check_output", "check_call", "Popen"):
        monkeypatch.setattr(subprocess, call, install)
    assert checks.check_requirements("no-such-package-of-anybody>=1") is False


@pytest.mark.fault(61)
def test_ultralytics_that_was_imported_first_without_safe_load_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "ultralytics" in sys.modules
    monkeypatch.setenv("ULTRALYTICS_SAFE_LOAD", "0")
    with pytest.raises(RuntimeError, match="import ours first"):
        hardening.harden()
