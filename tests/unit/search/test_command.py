"""The verb `search`: what it refuses before any work, and what it shows of a study."""

from __future__ import annotations

import importlib.util
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import toy_study as toy
from yolo_compress.cli.main import main
from yolo_compress.store.store import Store


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)  # which `main` answers


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 2) -> str:
    assert main(["search", *words]) == code
    out, err = capsys.readouterr()
    return out if code in (0, 1) else err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("recipe=digits",), "search needs study"),
        (("stop", "study=x"), "search: got 'stop', expected status, worker, report, or no word"),
        (("status", "study=x"), "no study x in"),
        (("status", "study=toy", "recipe=digits"), "search status takes only study=NAME"),
        (
            ("worker", "study=toy", "prune.lr0=0.01"),
            "prune.lr0: a worker takes the recipe of the study, and only run.device",
        ),
        (("study=x", "recipe=digits", "run.device=0,1"), "run.device=0,1: a trial trains on one device"),
        (("worker", "study=toy", "run.device=0,1"), "start `search worker` for each other one"),
        (("status", "study=../x"), "expected a name that can be a folder"),
        (("study=x", "recipe=digits", "prune=null"), "search varies how much prune removes"),
    ],
)
def test_it_refuses(home: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str) -> None:
    toy.study(home)
    assert message in " ".join(said(capsys, *words).split())


def test_without_optuna_nothing_starts(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "optuna" else find(name))
    assert "optuna is not installed, and search needs it: pip install" in said(
        capsys, "study=x", "recipe=digits", code=4
    )
    assert not (home / "searches").exists()


def test_status_needs_no_optuna_and_report_writes_files(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "optuna" else find(name))
    study = toy.study(home, "toy", ("search.trials", "4"))
    toy.instant(study).run()
    shown = said(capsys, "status", "study=toy", code=0)
    answer = json.loads(shown.splitlines()[-1])
    assert "4 of 4 trials ended (4 done)" in shown and answer["counts"]["done"] == 4 and answer["report"] is None
    shown = said(capsys, "report", "study=toy", code=0)
    answer = json.loads(shown.splitlines()[-1])
    assert Path(answer["report"]).is_file() and answer["command"].startswith("yolo-compress run recipe=")
    assert f"report: {answer['report']}" in shown


def test_a_status_beside_a_running_trial(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = toy.study(home)
    with study.given_out(toy.FileSampler(study.folder), 12) as trial:
        assert trial is not None
        answer = json.loads(said(capsys, "status", "study=toy", code=0).splitlines()[-1])
    assert answer["counts"] == {"done": 0, "stopped": 0, "failed": 0, "open": 1}
    assert not Store(home / "weights").folder.exists(), "status writes nothing"
