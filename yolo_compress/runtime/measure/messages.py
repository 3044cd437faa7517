"""Requests to a measuring process, and its replies. Each is one JSON line. See `latency` and `interleaved`."""

from __future__ import annotations

from typing import List, Optional, TypedDict

from .device import DeviceState


class Spec(TypedDict, total=False):
    """Request to open an engine, and how to measure its latency. If `module` is not `latency`, it may read more keys."""

    label: str  # name in error messages
    engine: str  # folder of the engine
    onnx_sha256: Optional[str]  # SHA-256 of the ONNX file that the engine must be built from
    threads: Optional[int]  # threads of one inference; null: one per usable processor
    inputs: Optional[str]  # .npy, float32 RGB [N, 3, H, W] in 0..1 (real images, letterboxed); null: noise
    images: List[str]  # image files that `end_to_end` detects in, in turn; `latency` does not read this key
    batch: int  # images per inference, if the engine takes any number; default 1
    warmup_ms: float  # the warm-up goes on until this and `warmup_n` are reached; default 200, quick 30
    warmup_n: int  # default 50, quick 5
    quick: bool  # shorter warm-up, for tests
    module: str  # Python module of the measuring process; default `latency`
    n: int  # timed calls if one spec is measured alone; default 1000


class RoundRequest(TypedDict):
    """Request to time one round of calls."""

    n: int  # timed calls


class Round(TypedDict):
    """Reply to a `RoundRequest`: the samples of one round, and the state of the process."""

    samples_ms: List[float]
    quiet: bool  # whether other programs were idle during the round, and this process after it
    memory_mib: Optional[float]  # peak memory of the process; null if the kernel does not report it


class About(TypedDict):
    """Reply to a `Spec`: the opened engine and the machine."""

    executed: str  # the arithmetic that the library chose, as text
    precision: str  # the requested precision
    imgsz: List[int]  # [height, width] of the input, px
    threads: Optional[int]
    input: str  # the .npy file, "images" for `end_to_end`, or "noise"
    images: int  # batches that the calls cycle through
    device: DeviceState


class Measured(About):
    """Latencies of one engine over all rounds, with the description of the engine."""

    samples_ms: List[float]
    rounds_ms: List[List[float]]  # the same samples by round
    quiet: bool  # whether all rounds were quiet
    memory_mib: Optional[float]  # peak memory of its process, after the last round


class Percentiles(TypedDict):
    """Percentiles of the latency in ms. A percentile is null if there are fewer samples than `latency.LEAST_SAMPLES` requires."""

    latency_p50_ms: Optional[float]
    latency_p90_ms: Optional[float]
    latency_p95_ms: Optional[float]
    latency_p99_ms: Optional[float]
    latency_n: int  # number of samples
