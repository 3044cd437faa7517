"""The front of a study, and the point that is chosen from it. Pure functions on measured engines.

The objectives are the lower end of the retention's 95 % interval, which has to be high, and the cost (ms or MiB), which has to be low.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from typing_extensions import TypedDict

Verdict = Literal["dense", "reached", "unproven", "missed"]


class Engine(TypedDict):
    """A finished engine: an engine of a trial, or of the unpruned baseline."""

    trial: int | None  # null: the baseline
    placement: str  # precision, or "int8-0.01" for groups in float by `qat.max_drop=0.01`
    retention: float  # mAP50-95 divided by that of the baseline in FP32
    low: float | None  # ends of its 95 % interval; null if too few images have objects
    high: float | None
    map50_95: float
    cost: float  # ms or MiB
    latency_ms: float | None  # p50; null if the search lowers the size
    size_mib: float
    processor: str | None  # processor or GPU that it was timed on; null if the search lowers the size
    quiet: bool  # whether other programs were idle while it was timed


@dataclass(frozen=True)
class Goal:
    """What a search looks for.

    Attributes:
        cost: What is lowered: "latency" in ms, or "size" in MiB.
        runtime: Runtime of the engines.
        limit: Largest cost. None: no limit.
        max_drop: Largest loss of mAP50-95, as a fraction of the baseline's.
    """

    cost: Literal["latency", "size"]
    runtime: str
    limit: float | None
    max_drop: float

    @property
    def unit(self) -> str:
        """Unit of the cost."""
        return "ms" if self.cost == "latency" else "MiB"

    @property
    def least(self) -> float:
        """Smallest retention."""
        return 1 - self.max_drop

    def text(self, cost: float) -> str:
        """Return a cost with its unit."""
        return f"{cost:.3g} {self.unit}"

    def affords(self, engine: Engine) -> bool:
        """Return whether the engine's cost is within the limit."""
        return self.limit is None or engine["cost"] <= self.limit


@dataclass(frozen=True)
class Choice:
    """The chosen engine, and whether it meets the goal.

    Attributes:
        verdict: "dense": the baseline meets the goal without pruning. "reached": the whole interval of the retention is high enough.
            "unproven": the retention is high enough, but these images cannot show it. "missed": no engine meets the goal, and this
            one is the nearest.
        engine: The chosen engine. None: nothing was measured.
        line: The verdict as a sentence.
    """

    verdict: Verdict
    engine: Engine | None
    line: str


def low(engine: Engine) -> float:
    """Return the lower end of the retention. Without an interval it is 0: too few images show nothing."""
    return engine["low"] if engine["low"] is not None else 0.0


def front(engines: Iterable[Engine]) -> list[Engine]:
    """Return the engines that no other engine beats in one objective without losing in the other, cheapest first."""
    found: list[Engine] = []
    for engine in sorted(engines, key=lambda one: (one["cost"], -low(one), -one["retention"])):
        if not found or low(engine) > low(found[-1]):
            found.append(engine)
    return found


def choose(engines: Sequence[Engine], goal: Goal) -> Choice:
    """Choose an engine. With a limit, it is the one that keeps most mAP within it; without, the cheapest one that keeps enough.

    If an engine of the baseline meets the goal already, it is chosen: nothing has to be pruned.
    """
    for of_baseline in (True, False):
        able = [one for one in engines if goal.affords(one) and (one["trial"] is None) == of_baseline]
        enough = [one for one in able if low(one) >= goal.least]
        if of_baseline and goal.limit is None:
            continue  # without a limit the baseline meets the goal at any cost
        if enough:
            best = _best(enough, goal)
            return Choice(
                "dense" if of_baseline else "reached", best, _line("dense" if of_baseline else "reached", best, goal)
            )
    able = [one for one in engines if goal.affords(one) and one["retention"] >= goal.least]
    if goal.limit is None:
        able = [one for one in able if one["trial"] is not None]
    if able:
        best = _best(able, goal)
        return Choice("unproven", best, _line("unproven", best, goal))
    if not engines:
        return Choice("missed", None, "MISSED: no engine was measured")
    best = min(engines, key=lambda one: (_shortfall(one, goal), one["cost"]))
    return Choice("missed", best, _line("missed", best, goal) + _in_the_way(engines, goal))


def _best(engines: Sequence[Engine], goal: Goal) -> Engine:
    if goal.limit is None:
        return min(engines, key=lambda one: (one["cost"], -low(one)))
    return min(engines, key=lambda one: (-low(one), -one["retention"], one["cost"]))


def _shortfall(engine: Engine, goal: Goal) -> float:
    """Return how far an engine is from the goal: the larger of both shares that are missing."""
    over = max(0.0, engine["cost"] / goal.limit - 1) if goal.limit else 0.0
    return max(over, (goal.least - engine["retention"]) / goal.least if goal.least else 0.0)


def _line(verdict: Verdict, engine: Engine, goal: Goal) -> str:
    who = "the unpruned baseline" if engine["trial"] is None else f"trial {engine['trial']}"
    interval = "no interval" if engine["low"] is None else f"95 % interval from {engine['low']:.1%}"
    figures = (
        f"{who}, {engine['placement']}: {goal.text(engine['cost'])}, {engine['retention']:.1%} of mAP50-95 ({interval})"
    )
    limit = "" if goal.limit is None else f"{goal.text(goal.limit)} and "
    goal_text = f"{limit}{goal.least:.1%} of mAP50-95"
    return {
        "dense": f"REACHED without pruning: {figures}; asked were {goal_text}",
        "reached": f"REACHED: {figures}; asked were {goal_text}",
        "unproven": f"UNPROVEN: {figures}; these images cannot show that it keeps {goal.least:.1%}",
        "missed": f"MISSED: nearest is {figures}; asked were {goal_text}",
    }[verdict]


def _in_the_way(engines: Sequence[Engine], goal: Goal) -> str:
    """Return what keeps a study from its goal, and what to change."""
    able = [one for one in engines if goal.affords(one)]
    if not able:
        fastest = min(one["cost"] for one in engines)
        return (
            f". The {goal.cost} stands in the way: the lowest is {goal.text(fastest)}; lower the start of search.keep_flops, name "
            "another search.precision or search.runtime, or take a smaller baseline or data.imgsz"
        )
    most = max(one["retention"] for one in able)
    return (
        f". The mAP stands in the way: within the limit, {most:.1%} is the most; give more epochs or trials, a larger teacher, or a "
        "larger search.max_drop"
    )
