"""Types of the document that `rollout` prints and of its state file, both schema 1. NaN and infinity are written as null.

Model A is in use. Model B is the new model (the canary).
"""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict

Status = Literal["abort", "advance", "hold"]


class Model(TypedDict):
    """Name and version of the bundle that one of the two models comes from."""

    name: str
    version: int


class Verdict(TypedDict):
    status: Status
    reasons: list[str]


class Evidence(TypedDict):
    """Numbers of frames behind the verdict, and of lines that were left out."""

    paired: int  # frames that are in both logs
    used: int  # paired frames that belong to this stage and are far enough apart
    hours: float  # time that the used frames cover
    silent_b: float  # share of A's frames for which B has no line
    alone_a: int  # frames of A that B's log does not have
    alone_b: int
    bad_lines: list[int]  # [A, B]: number of lines that cannot be read
    ahead: list[int]  # [A, B]: number of lines with a time in the future
    duplicates: list[int]
    skew_s: float  # median time of B's lines minus that of A's lines for the same frames


class Rule(TypedDict):
    """Result of one rule: a quantity, its budget, and the quantity's interval at the error level of an abort."""

    name: str
    value: float | None
    low: float | None
    high: float | None
    budget: float
    says: Literal["beyond", "within", "open"]
    n: int  # observations


class Document(TypedDict):
    """The document that `rollout` prints: the verdict on a release, with the evidence and the result of each rule."""

    schema: int
    a: Model
    b: Model
    verdict: Verdict
    stage: float  # share of the robots in the stage that the evidence comes from
    exposure: float  # share of the robots that must run B from now on
    release: str  # "running", "aborted" or "done"
    evidence: Evidence
    rules: list[Rule]
    settings: dict[str, object]  # alpha, stages, spacing_s, cap, and the budgets by name


class StateFile(TypedDict):
    """The state of a release between two calls of `rollout`."""

    schema: int
    a: tuple[str, int]  # name and version
    b: tuple[str, int]
    status: str
    stage: int  # index into `state.STAGES`
    since: float | None  # A's time of the last frame that an earlier stage has used; null: none
