"""Measure the latency of engines: warm-up, timed calls, and the percentiles that the sample size allows.

`python -m yolo_compress.runtime.measure.latency '{"engine": "DIR", "n": 1000}'` measures one engine and prints JSON. The argument is
a JSON object of type `messages.Spec`. If there is no argument, the process serves `measure_in_turn`: it reads and answers one JSON
line at a time. Every engine has its own process, because the waiting threads of one library slow down the next library by up to 40 %.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Callable, List, Optional, Sequence

import numpy as np

from ..backends.base import Backend
from ..detect.pre import LUMA_3
from ..engine import open_engine
from .device import busy_s, device_state, read_line
from .interleaved import measure_in_turn
from .messages import About, Percentiles, Round, RoundRequest, Spec

__all__ = ["LEAST_SAMPLES", "Served", "main", "measure", "measure_in_turn", "open_spec", "percentiles"]

# Smallest number of samples for a percentile: MLPerf Inference's early stopping needs this many queries at 99 % confidence
# (https://github.com/mlcommons/inference_policies, appendix on early stopping).
LEAST_SAMPLES = {50: 1, 90: 64, 95: 130, 99: 662}
ROUND_WARMUP_MS, ROUND_WARMUP_N = 20.0, 5  # after an idle round the caches are cold
QUIET_WINDOW_S, QUIET_SHARE, QUIET_LIMIT_S = 0.02, 0.1, 2.0
# Other programs disturb a round if they use more than this, in processors. Below this time the kernel's counters are too coarse.
OTHERS_CPUS, OTHERS_LEAST_S = 0.25, 0.5
Calls = Callable[[Backend, Spec], List[Callable[[], Any]]]


def measure(
    call: Callable[[], Any], n: int, warmup_ms: float = 200.0, warmup_n: int = 50, calls: Optional[List] = None
) -> np.ndarray:
    """Time `n` calls, one after another, after a warm-up. Return the time of each call in ms.

    Args:
        call: function that runs one inference and returns when the inference is done.
        n: number of samples.
        warmup_ms, warmup_n: the warm-up continues until it has taken this time and has made this number of calls.
        calls: functions that are called one after another in place of `call`, such as one function per input image.

    Returns:
        (n,) array, ms.
    """
    turn = calls or [call]
    begun, count = time.perf_counter(), 0
    while count < warmup_n or (time.perf_counter() - begun) * 1e3 < warmup_ms:
        turn[count % len(turn)]()
        count += 1
    samples = np.empty(n)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(n):
            one = turn[i % len(turn)]
            start = time.perf_counter()
            one()
            samples[i] = time.perf_counter() - start
    finally:
        if collecting:
            gc.enable()
    return samples * 1e3


def percentiles(samples_ms: Sequence[float]) -> Percentiles:
    """Return p50, p90, p95 and p99 in ms, and the number of samples.

    A percentile is None if there are fewer samples than `LEAST_SAMPLES` requires.
    """

    def at(percent: int) -> Optional[float]:
        enough = len(samples_ms) >= LEAST_SAMPLES[percent]
        return float(np.percentile(samples_ms, percent)) if enough else None

    return {
        "latency_p50_ms": at(50),
        "latency_p90_ms": at(90),
        "latency_p95_ms": at(95),
        "latency_p99_ms": at(99),
        "latency_n": len(samples_ms),
    }


class Served:
    """An opened engine in a measuring process, with its input images. It answers the requests to time a round of calls.

    Args:
        calls: makes the functions that are timed, one per input. None: one inference of the engine alone.
    """

    def __init__(self, backend: Backend, spec: Spec, calls: Optional[Calls] = None) -> None:
        quick = bool(spec.get("quick", False))
        self.backend, self.spec = backend, spec
        self.warmup_ms = float(spec.get("warmup_ms", 30.0 if quick else 200.0))
        self.warmup_n = int(spec.get("warmup_n", 5 if quick else 50))
        self.calls = (calls or _bound)(backend, spec)
        self._warm = False

    def about(self) -> About:
        """Return the description of the opened engine and the machine: the reply to a `Spec`."""
        return {
            "executed": self.backend.executed,
            "precision": self.backend.precision,
            "imgsz": list(self.backend.imgsz),
            "threads": getattr(self.backend, "threads", None),
            "input": self.spec.get("inputs") or ("images" if self.spec.get("images") else "noise"),
            "images": len(self.calls),
            "device": device_state(),
        }

    def one_round(self, n: int) -> Round:
        """Time `n` calls after a warm-up, then wait until the threads of the engine library are idle.

        The warm-up before the first round is the longest. The round was quiet if these threads became idle, and if other programs
        used hardly any processor during the round.
        """
        warmup = (ROUND_WARMUP_MS, ROUND_WARMUP_N) if self._warm else (self.warmup_ms, self.warmup_n)
        used_by_others = others_cpus()
        samples = measure(self.calls[0], n, warmup[0], warmup[1], self.calls)
        others = used_by_others()
        self._warm = True
        quiet = _wait_for_quiet() and (others is None or others < OTHERS_CPUS)
        return {"samples_ms": [round(float(s), 6) for s in samples], "quiet": quiet, "memory_mib": peak_memory_mib()}


def _bound(backend: Backend, spec: Spec) -> List[Callable[[], Any]]:
    """Return a function for each input batch, which runs one inference of the engine alone."""
    return [backend.bind(images) for images in _inputs(backend, spec.get("inputs"), int(spec.get("batch", 1)))]


def _inputs(backend: Backend, file: Optional[str], batch: int = 1) -> List[np.ndarray]:
    """Return the input batches for the timed calls: the images in a .npy file, or noise if `file` is None."""
    size = backend.batch or batch
    if file is None:
        shape = (size, backend.channels) + tuple(backend.imgsz)
        return [np.random.default_rng(0).random(shape, dtype=np.float32)]
    images_NCHW = np.load(file, allow_pickle=False)
    if images_NCHW.ndim != 4 or len(images_NCHW) < size:
        raise ValueError(f"{file}: array {list(images_NCHW.shape)}, expected at least [{size}, 3, H, W]")
    if backend.channels == 1:
        share_311 = (LUMA_3 / np.float32(1 << 15)).astype(np.float32)[:, None, None]
        images_NCHW = (images_NCHW * share_311).sum(axis=1, keepdims=True)
    return [images_NCHW[start : start + size] for start in range(0, len(images_NCHW) - size + 1, size)]


def peak_memory_mib() -> Optional[float]:
    """Return the peak memory of this process with its libraries, in MiB. None: the kernel does not report it."""
    for text in (read_line("/proc/self/status") or "").splitlines():
        if text.startswith("VmHWM:"):
            return round(int(text.split()[1]) / 1024, 1)
    return None


def _wait_for_quiet() -> bool:
    """Wait until this process uses less than 10 % of a processor. Return False if that takes more than two seconds."""
    limit = time.perf_counter() + QUIET_LIMIT_S
    while time.perf_counter() < limit:
        before = time.process_time()
        time.sleep(QUIET_WINDOW_S)
        if time.process_time() - before < QUIET_SHARE * QUIET_WINDOW_S:
            return True
    return False


def others_cpus() -> Callable[[], Optional[float]]:
    """Start to count the processor time of other programs.

    Returns:
        Function that returns how many processors other programs have used on average since then. None: the kernel does not count,
        or less than `OTHERS_LEAST_S` have passed. The time of other virtual machines also counts, if the kernel reports it.
    """

    def others_s() -> Optional[float]:
        total = busy_s()
        return None if total is None else total - time.process_time()

    start, before = time.perf_counter(), others_s()

    def since() -> Optional[float]:
        passed, after = time.perf_counter() - start, others_s()
        if before is None or after is None or passed < OTHERS_LEAST_S:
            return None
        return max(0.0, (after - before) / passed)

    return since


def open_spec(spec: Spec) -> Backend:
    """Open the engine that a `Spec` describes."""
    return open_engine(Path(spec["engine"]), threads=spec.get("threads"), onnx_sha256=spec.get("onnx_sha256"))


def main(
    open_backend: Callable[[Any], Backend] = open_spec,
    argv: Optional[List[str]] = None,
    calls: Optional[Calls] = None,
) -> int:
    """Measure the engine that the argument describes, or answer requests on stdin if there is no argument.

    `open_backend` opens the engine from a `Spec`. Other packages pass their own function, such as one for a torch module. `calls`
    makes the functions that are timed; see `Served`.

    First, stdout is redirected to stderr. Output of a library then cannot break the protocol.
    """
    arguments = sys.argv[1:] if argv is None else argv
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    spec = json.loads(arguments[0] if arguments else sys.stdin.readline())
    with open_backend(spec) as backend:
        served = Served(backend, spec, calls)
        if arguments:
            samples = served.one_round(int(spec.get("n", 1000)))
            result = dict(served.about(), **samples, **percentiles(samples["samples_ms"]))
            print(json.dumps(result), file=replies, flush=True)
            return 0
        print(json.dumps(served.about()), file=replies, flush=True)
        for line in sys.stdin:
            request: RoundRequest = json.loads(line)
            print(json.dumps(served.one_round(int(request["n"]))), file=replies, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
