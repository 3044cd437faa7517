"""What a measuring process is asked and what it answers: one JSON line each, see `latency` and `interleaved`."""

from __future__ import annotations

from typing import List, Optional, TypedDict

from .device import DeviceState


class Spec(TypedDict, total=False):
    """What is measured, and how; a `module` of its own reads further keys."""

    label: str  # names it in errors
    engine: str  # folder of the engine
    onnx_sha256: Optional[str]  # the ONNX that the engine has to come from
    threads: Optional[int]  # of one inference; null: every usable processor
    inputs: Optional[str]  # .npy, float32 RGB [N, 3, H, W] in 0..1 (real images, letterboxed); null: noise
    batch: int  # images of one inference, where the engine takes any number; default 1
    warmup_ms: float  # the warm-up goes on until this and `warmup_n` are reached; default 200, quick 30
    warmup_n: int  # default 50, quick 5
    quick: bool  # a smaller warm-up, for tests and first looks
    module: str  # Python module that serves it; default `latency`
    n: int  # timed calls, where one spec is measured alone; default 1000


class RoundRequest(TypedDict):
    """Asks for one round."""

    n: int  # timed calls


class Round(TypedDict):
    """The answer to `RoundRequest`."""

    samples_ms: List[float]
    quiet: bool  # whether the process came to rest afterwards
    memory_mib: Optional[float]  # the most that the process ever held; null where the kernel does not say


class About(TypedDict):
    """The answer to a spec: what runs, and where."""

    executed: str  # the arithmetic that the library chose, in words
    precision: str  # as asked for
    imgsz: List[int]  # [height, width] of the input, px
    threads: Optional[int]
    input: str  # the .npy file, or "noise"
    images: int  # batches that the calls cycle through
    device: DeviceState


class Measured(About):
    """All rounds of one spec."""

    samples_ms: List[float]
    rounds_ms: List[List[float]]  # the same by round
    quiet: bool  # False where its threads were still at work in others' rounds
    memory_mib: Optional[float]  # of its process, at the last round


class Percentiles(TypedDict):
    """A percentile is null where there are fewer samples than `latency.LEAST_SAMPLES`."""

    latency_p50_ms: Optional[float]
    latency_p90_ms: Optional[float]
    latency_p95_ms: Optional[float]
    latency_p99_ms: Optional[float]
    latency_n: int  # samples
