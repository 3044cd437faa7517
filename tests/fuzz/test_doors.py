"""500 cases over all doors; `make fuzz` runs 20,000."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import strategies as st

from tests.fuzz.doors import DOORS
from tests.fuzz.mutate import NUMBERS
from tests.fuzz.run import BUG, CASES, Door, run
from yolo_compress.errors import DataError

FAST = 500


def _fast(door: Door) -> int:
    return -(-door.share * FAST // CASES)


def test_shares_are_of_all_cases() -> None:
    assert sum(door.share for door in DOORS) == CASES and len({door.name for door in DOORS}) == len(DOORS)
    assert sum(_fast(door) for door in DOORS) >= FAST


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.name)
def test_no_case_ends_with_a_traceback(door: Door, tmp_path: Path) -> None:
    outcome = run(door, tmp_path.resolve(), _fast(door))
    assert outcome.cases == _fast(door)
    assert not outcome.failed, "\n\n".join(outcome.failures.values())


def _door(call: Callable[[], int | None]) -> Door:
    return Door("x", 1, lambda folder: (st.sampled_from(NUMBERS), lambda case: case and call(), b""))


def test_what_a_failure_is(tmp_path: Path) -> None:
    """So that a suite without failures says something."""

    def refuses() -> None:
        raise DataError("x")

    def fails() -> None:
        raise KeyError("x")

    def hoards() -> int:
        return len(bytearray(3 << 30))

    assert run(_door(refuses), tmp_path, 5).failed == 0
    assert run(_door(lambda: BUG), tmp_path, 5).failed > 0
    found = run(_door(fails), tmp_path, 5)
    assert 0 < found.failed <= found.cases and [text[:8] for text in found.failures.values()] == ["KeyError"]
    assert [text[:6] for text in run(_door(hoards), tmp_path, 5).failures.values()] == ["memory"]


def test_a_case_that_does_not_end_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fuzz.run.SECONDS", 0.05)

    def hangs() -> None:
        while True:
            pass

    assert [text[:4] for text in run(_door(hangs), tmp_path, 3).failures.values()] == ["hung"]


def test_a_door_that_refuses_what_is_sound_is_no_test(tmp_path: Path) -> None:
    def refuses(case: bytes) -> None:
        raise DataError("x")

    with pytest.raises(AssertionError, match="the sound case ends with"):
        run(Door("x", 1, lambda folder: (st.just(b""), refuses, b"")), tmp_path, 1)
