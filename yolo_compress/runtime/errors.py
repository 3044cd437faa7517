"""What can go wrong with an engine; callers outside `runtime/` translate these into their own family."""

from __future__ import annotations


class RuntimeUnavailable(Exception):
    """The engine library, a driver or a device is not here.

    Attributes:
        hint: what to install or do.
    """

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(f"{what}; {hint}")
        self.hint = hint


class EngineError(Exception):
    """An engine that is altered, truncated, built elsewhere, or cannot do what is asked of it."""


class NotFinite(EngineError):
    """A network's output holds NaN or infinity."""


class LatencyError(Exception):
    """A measuring process failed; carries its own message and the end of its stderr."""


class SourceError(Exception):
    """Pictures that were asked for and are not there, or a video that cannot be opened."""
