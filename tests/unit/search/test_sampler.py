"""Optuna's study: points on the axes, the recipe's own first, and what a kill leaves in it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from yolo_compress.errors import EnvironmentLacks
from yolo_compress.search import sampler
from yolo_compress.search.sampler import JOURNAL, OptunaSampler
from yolo_compress.search.space import Axis, Point

SPACE = {
    "keep_flops": Axis(low=0.3, high=0.8),
    "criterion": Axis(choices=("obs", "taylor")),
    "round_to": Axis(choices=(8,)),
    "box_weight": Axis(low=0.5, high=3.0, log=True),
}
OWN: Point = {"keep_flops": 0.5, "criterion": "obs", "round_to": 8, "box_weight": 1.0}


def opened(folder: Path, storage: str | None = None) -> OptunaSampler:
    made = OptunaSampler(folder, "s", SPACE, OWN, seed=0, trials=12, storage=storage)
    if made.owner is None:
        made.claim("id")
    return made


def test_without_optuna_the_command_to_install_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        EnvironmentLacks, match=r"optuna is not installed, and search needs it: pip install 'yolo-compress\[search\]'"
    ):
        sampler.require()


class TestOptuna:
    @pytest.fixture(autouse=True)
    def _needs_optuna(self) -> None:
        pytest.importorskip("optuna")

    def test_the_first_point_is_the_recipes_own(self, tmp_path: Path) -> None:
        assert opened(tmp_path).ask() == (0, OWN)

    @pytest.mark.parametrize("storage", [None, "sqlite:///study.db"], ids=["journal", "database"])
    def test_two_workers_share_a_study(
        self, tmp_path: Path, storage: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        first, second = opened(tmp_path, storage), opened(tmp_path, storage)
        points = [first.ask(), second.ask(), first.ask()]
        assert [number for number, _ in points] == [0, 1, 2]
        assert len({point["keep_flops"] for _, point in points}) == 3, (
            "a second worker does not repeat the first one's points"
        )
        assert second.waiting() == dict(points)
        second.tell(0, (0.98, 3.0))
        first.tell(0, (0.5, 9.0))  # said before
        first.tell(1, None)
        second.tell(2, None, failed=True)
        assert first.waiting() == {} and (tmp_path / JOURNAL).exists() == (storage is None)

    def test_points_are_on_the_axes_and_a_study_is_reproducible(self, tmp_path: Path) -> None:
        runs = []
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            made = opened(tmp_path / name)
            points = []
            for _ in range(8):
                made = opened(tmp_path / name)  # continued after each trial
                number, point = made.ask()
                made.tell(number, (1 - float(point["keep_flops"]) / 2, float(point["keep_flops"])))
                points.append(point)
            runs.append(points)
        assert runs[0] == runs[1] and len({point["keep_flops"] for point in runs[0]}) == 8
        for point in runs[0]:
            assert point == {knob: SPACE[knob].nearest(value) for knob, value in point.items()}

    def test_the_owner_is_kept(self, tmp_path: Path) -> None:
        opened(tmp_path)
        assert opened(tmp_path).owner == "id"

    def test_a_point_that_was_half_drawn_is_none(self, tmp_path: Path) -> None:
        made = opened(tmp_path)
        trial = made._study.ask()
        trial.suggest_float("keep_flops", 0.3, 0.8)
        assert made.waiting() == {trial.number: None}

    @pytest.mark.parametrize("address", ["nonsense", "nodatabase://user:secret@host/x"])
    def test_a_database_that_cannot_be_used(self, tmp_path: Path, address: str) -> None:
        with pytest.raises(EnvironmentLacks, match=r"search.storage=.*the database cannot be used") as caught:
            opened(tmp_path, address)
        assert "secret" not in str(caught.value)
