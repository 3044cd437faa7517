"""State of a staged rollout: the share of robots that run the canary, and the next stages.

    running at 1 % -> 5 % -> 25 % -> 100 % -> done        one stage for each `advance`, on new evidence
    any of them -> aborted                                this is final: the next release needs another version

These functions only compute states. judge.py decides, and yolo_compress/cli/rollout.py writes the state file.
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
    """State of a release between two calls of `rollout`.

    Attributes:
        a, b: (name, version) of model A, which is in use, and of the new model B. Other models belong to another release.
        status: running, aborted (final) or done (B runs on all robots, and can still be aborted).
        stage: Index into `STAGES`, the shares of the robots that run B.
        since: Time of the last frame that an earlier stage used, by the clock of model A: Unix time in s.
    """

    a: tuple[str, int]
    b: tuple[str, int]
    status: str = "running"
    stage: int = 0
    since: float = -math.inf

    @property
    def exposure(self) -> float:
        """Fraction of the robots that run B now."""
        return 0.0 if self.status == "aborted" else STAGES[self.stage]


def stage_of(text: str) -> int:
    """Return the index of a stage written as `5%`, `5` or `0.05`.

    Raises:
        RecipeError: There is no such stage.
    """
    shares = {f"{100 * share:g}": i for i, share in enumerate(STAGES)} | {
        f"{s:g}": i for i, s in enumerate(STAGES[:-1])
    }
    stage = shares.get(text.removesuffix("%"))
    if stage is None:
        raise RecipeError(f"command line: stage: got {text!r}, expected one of {', '.join(f'{s:.0%}' for s in STAGES)}")
    return stage


def state_json(state: State) -> StateFile:
    """Convert a state to the JSON document of the state file."""
    return {
        "schema": SCHEMA,
        "a": state.a,
        "b": state.b,
        "status": state.status,
        "stage": state.stage,
        "since": None if state.since == -math.inf else state.since,
    }


def state_from(document: Any, where: str) -> State:
    """Convert the JSON document of a state file to a state. `where` is the path of the file, for error messages.

    Raises:
        DataError: The document is not a state.
    """
    try:
        since = document["since"]
        if since is not None and (type(since) not in (int, float) or not math.isfinite(since)):
            raise ValueError(f"since is {since!r}")
        a, b = ((str(document[key][0]), int(document[key][1])) for key in ("a", "b"))
        state = State(a, b, document["status"], document["stage"], -math.inf if since is None else float(since))
        valid = document["schema"] == SCHEMA and state.status in ("running", "aborted", "done")
        valid &= type(state.stage) is int and 0 <= state.stage < len(STAGES)
        valid &= state.status != "done" or state.stage == len(STAGES) - 1
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise DataError(
            f"{where}: not the state of a release ({error!r}); remove it to begin a new release at 1 %"
        ) from error
    if not valid:
        raise DataError(f"{where}: not the state of a release; remove it to begin a new release at 1 %")
    return state


def step(state: State, verdict: str, until: float, cap: float = 1.0) -> State:
    """Return the state of the release after a verdict. The share of robots that run B grows by at most one stage, up to `cap`.

    Args:
        state: State before the verdict.
        verdict: "abort", "advance" or "hold".
        until: Time of the last frame that the verdict counts, by the clock of model A: Unix time in s.
        cap: Largest share of robots that may run B, 0 to 1.
    """
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
