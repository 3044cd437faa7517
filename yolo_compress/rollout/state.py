"""The state of a grey release: how many robots run the canary, and what may follow.

    running at 1 % -> 5 % -> 25 % -> 100 % -> done        a stage an `advance`, on evidence of its own
    any of them -> aborted                                and nothing leads out of it: the next release is another version

Pure: what decides is in rollout.py, who writes it down in yolo_compress/cli/rollout.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from yolo_compress.errors import DataError, RecipeError
from yolo_compress.rollout.schema import StateFile

SCHEMA = 1
STAGES = (0.01, 0.05, 0.25, 1.0)  # shares of the robots that run B


@dataclass(frozen=True)
class State:
    """Of a release, kept from look to look.

    Attributes:
        a, b: name and version of the models; other models are another release.
        status: running, aborted (nothing leads out of it) or done (B runs everywhere; it can still be aborted).
        stage: index into STAGES.
        since: A's time of the last frame that an earlier stage has used.
    """

    a: tuple[str, int]
    b: tuple[str, int]
    status: str = "running"
    stage: int = 0
    since: float = -math.inf

    @property
    def exposure(self) -> float:
        """Share of the robots that run B now."""
        return 0.0 if self.status == "aborted" else STAGES[self.stage]


def stage_of(text: str) -> int:
    """Index of a stage written as `5%`, `5` or `0.05`.

    Raises:
        RecipeError: no such stage.
    """
    shares = {f"{100 * share:g}": i for i, share in enumerate(STAGES)} | {
        f"{s:g}": i for i, s in enumerate(STAGES[:-1])
    }
    found = shares.get(text.removesuffix("%"))
    if found is None:
        raise RecipeError(f"command line: stage: got {text!r}, expected one of {', '.join(f'{s:.0%}' for s in STAGES)}")
    return found


def state_json(state: State) -> StateFile:
    """As the state file holds it."""
    return {
        "schema": SCHEMA,
        "a": state.a,
        "b": state.b,
        "status": state.status,
        "stage": state.stage,
        "since": None if state.since == -math.inf else state.since,
    }


def state_from(document: Any, where: str) -> State:
    """The reverse.

    Raises:
        DataError: it is of another form.
    """
    try:
        since = document["since"]
        if since is not None and (type(since) not in (int, float) or not math.isfinite(since)):
            raise ValueError(f"since is {since!r}")
        a, b = ((str(document[key][0]), int(document[key][1])) for key in ("a", "b"))
        state = State(a, b, document["status"], document["stage"], -math.inf if since is None else float(since))
        formed = document["schema"] == SCHEMA and state.status in ("running", "aborted", "done")
        formed &= type(state.stage) is int and 0 <= state.stage < len(STAGES)
        formed &= state.status != "done" or state.stage == len(STAGES) - 1
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise DataError(f"{where}: no state of a release ({error!r}); remove it to begin a new one at 1 %") from error
    if not formed:
        raise DataError(f"{where}: no state of a release; remove it to begin a new one at 1 %")
    return state


def step(state: State, verdict: str, until: float, cap: float = 1.0) -> State:
    """The state after a verdict on the evidence up to A's time `until`. Exposure grows by one stage, and not above `cap`."""
    if state.status == "aborted":
        return state
    if verdict == "abort":
        return replace(state, status="aborted")
    if verdict != "advance" or state.status == "done":
        return state
    if state.stage == len(STAGES) - 1:
        return replace(state, status="done", since=until)
    if STAGES[state.stage + 1] > cap:
        return state
    return replace(state, stage=state.stage + 1, since=until)
