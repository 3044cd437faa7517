"""The types of what `rollout` prints and of its state file, both schema 1. NaN and infinity are written as null."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict

Status = Literal["abort", "advance", "hold"]


class Model(TypedDict):
    """A model of the release, by its bundle."""

    name: str
    version: int


class Verdict(TypedDict):
    status: Status
    reasons: list[str]


class Evidence(TypedDict):
    """The frames that the verdict rests on."""

    paired: int  # frames of both logs
    used: int  # of these, far enough apart and of this stage
    hours: float  # that they cover
    silent_b: float  # share of A's frames that B says nothing of
    alone_a: int  # frames of A without partner
    alone_b: int
    bad_lines: list[int]  # lines that cannot be read, of A and B; so the next three
    ahead: list[int]  # lines from after now
    duplicates: list[int]
    skew_s: float  # how much later B says the same frames


class Rule(TypedDict):
    """A quantity beside its budget, with its interval at the level of an abort."""

    name: str
    value: float | None
    low: float | None
    high: float | None
    budget: float
    says: Literal["beyond", "within", "open"]
    n: int  # observations


class Document(TypedDict):
    """A look at a release."""

    schema: int
    a: Model
    b: Model
    verdict: Verdict
    stage: float  # share of the robots that the evidence is of
    exposure: float  # share of the robots that are to run B now
    release: str  # "running", "aborted" or "done"
    evidence: Evidence
    rules: list[Rule]
    settings: dict[str, object]  # alpha, stages, spacing_s, cap, and the budgets by name


class StateFile(TypedDict):
    """The state of a release between two looks."""

    schema: int
    a: tuple[str, int]  # name and version
    b: tuple[str, int]
    status: str
    stage: int  # index into `state.STAGES`
    since: float | None  # A's time of the last frame that an earlier stage has used; null: none
