"""The front and the choice: engines that no other one beats, and the one that meets the goal."""

from __future__ import annotations

import random

from tests.support.toy_study import engine
from yolo_compress.search.front import Engine, Goal, choose, front, low

GOAL = Goal("latency", "openvino", 4.0, 0.05)


def made(trial: int | None, cost: float, retention: float, width: float = 0.01) -> Engine:
    return {
        **engine(trial, 0.5),
        "cost": cost,
        "retention": retention,
        "low": retention - width,
        "high": retention + width,
    }


def test_the_front_is_what_no_other_engine_dominates() -> None:
    dice = random.Random(0)
    engines = [made(number, round(dice.uniform(1, 9), 1), round(dice.uniform(0.5, 1), 2)) for number in range(300)]

    def dominated(one: Engine) -> bool:
        return any(
            other["cost"] <= one["cost"]
            and low(other) >= low(one)
            and (other["cost"], low(other)) != (one["cost"], low(one))
            for other in engines
        )

    expected = {(one["cost"], low(one)) for one in engines if not dominated(one)}
    found = front(engines)
    assert {(one["cost"], low(one)) for one in found} == expected and len(found) == len(expected)
    assert [one["cost"] for one in found] == sorted(one["cost"] for one in found)


def test_a_target_that_the_baseline_meets_is_said() -> None:
    found = choose([made(None, 3.0, 0.999), made(0, 2.0, 0.97)], GOAL)
    assert found.verdict == "dense" and found.line.startswith(
        "REACHED without pruning: the unpruned baseline, int8: 3 ms, 99.9% of"
    )


def test_with_a_limit_the_most_map_within_it() -> None:
    found = choose([made(None, 9.0, 1.0), made(0, 2.0, 0.965), made(1, 3.9, 0.98), made(2, 4.1, 0.99)], GOAL)
    assert found.verdict == "reached" and found.engine and found.engine["trial"] == 1


def test_without_a_limit_the_cheapest_that_keeps_enough() -> None:
    goal = Goal("size", "openvino", None, 0.05)
    found = choose([made(None, 9.0, 1.0), made(0, 2.0, 0.955), made(1, 3.0, 0.97), made(2, 4.0, 0.99)], goal)
    assert found.verdict == "reached" and found.engine and found.engine["trial"] == 1 and "3 MiB" in found.line


def test_an_interval_that_reaches_below_the_goal_is_unproven() -> None:
    found = choose([made(None, 9.0, 1.0), made(0, 3.0, 0.955)], GOAL)
    assert found.verdict == "unproven" and "these images cannot show that it keeps 95.0%" in found.line


def test_too_few_images_prove_nothing() -> None:
    few: Engine = {**made(0, 3.0, 1.0), "low": None, "high": None}
    found = choose([few], GOAL)
    assert found.verdict == "unproven" and "no interval" in found.line


def test_a_target_that_nothing_reaches_names_the_nearest_and_what_stands_in_the_way() -> None:
    slow = choose([made(None, 9.0, 1.0), made(0, 4.4, 0.97), made(1, 5.0, 0.99)], GOAL)
    assert slow.verdict == "missed" and slow.engine and slow.engine["trial"] == 0
    assert "The latency stands in the way: the lowest is 4.4 ms; lower the start of search.keep_flops" in slow.line
    inaccurate = choose([made(None, 9.0, 1.0), made(0, 3.0, 0.90), made(1, 2.0, 0.80)], GOAL)
    assert inaccurate.engine and inaccurate.engine["trial"] == 0
    assert "The mAP stands in the way: within the limit, 90.0% is the most" in inaccurate.line


def test_without_engines_nothing_is_chosen() -> None:
    assert choose([], GOAL).engine is None
