"""The document in device.json, which `bench.py` writes: its types, and its rows as text tables."""

from __future__ import annotations

from typing import Dict, List, Literal, Optional, Sequence, Tuple, TypedDict, Union

from ..measure import golden, jetson
from ..measure.cascade_latency import CascadeLatency
from ..measure.messages import Percentiles
from .bundle import CASCADE, BundleId

SCHEMA = 1


class Subject(TypedDict):
    """The engine of a row, and the result of its golden self-test."""

    model: str  # "compressed"
    runtime: str
    precision: str  # the requested precision
    executed: str  # the arithmetic that the library chose, as text
    library: str  # version of the runtime
    golden: golden.SelfTest


class _Ap(TypedDict):
    map50_95: Optional[float]  # a fraction; null without --data, as `map50` and `images`
    map50: Optional[float]
    images: Optional[int]


class Accuracy(_Ap, total=False):
    """Accuracy on the images of --data."""

    per_class: Dict[str, Optional[float]]  # map50_95 by class name; absent without --data


class EndToEnd(TypedDict):
    """Latency from a decoded image to its detections, one image at a time. A percentile is null if too few calls were timed."""

    end_to_end_p50_ms: Optional[float]
    end_to_end_p90_ms: Optional[float]
    end_to_end_p95_ms: Optional[float]
    end_to_end_p99_ms: Optional[float]
    end_to_end_n: int  # timed calls


class Alone(Percentiles):
    """Latency of the engine without pre- and postprocessing, measured in a separate process."""

    memory_mib: Optional[float]  # peak memory of that process
    threads: Optional[int]  # threads of one inference on a CPU
    latency_quiet: bool  # whether other programs were idle in all rounds, and the engine between them


class Power(TypedDict):
    """Power draw. Null: this machine has no power meter."""

    power_w: Optional[float]  # under the pipeline's full load
    energy_mj_per_frame: Optional[float]  # mJ per image under that load


class Rest(TypedDict):
    status: Literal["ok"]
    reason: Optional[str]
    image_set: Optional[str]  # digest of the images of --data and their boxes
    fps: float  # decoded images per second, several in parallel
    idle_w: Optional[float]


class MeasuredRow(Subject, Accuracy, EndToEnd, Alone, Power, Rest):
    """A row of device.json for an engine that was measured."""


class MissingRow(TypedDict):
    """A row of device.json for a runtime without an engine. All other keys of `MeasuredRow` are null."""

    model: str  # "compressed"
    runtime: str
    precision: str
    status: Literal["missing"]
    reason: str


class CascadeRow(Subject, Accuracy, CascadeLatency):
    """A cascade in device.json. Latencies are for images of which the share `kept` is kept."""

    kept: float  # share of the images that only the small model sees
    kept_images: Optional[int]  # images of --data that `kept` was measured on; null: `kept` is of the validation images
    image_set: Optional[str]  # digest of the images of --data and their boxes
    fps: float  # golden images per second in these shares, several in parallel


class Worst(TypedDict):
    """The worst result of the golden self-tests of all engines."""

    passed: bool
    worst_box_px: float
    worst_score: float


class _Cascades(TypedDict, total=False):
    cascades: List[CascadeRow]  # absent if none was measured


class Document(_Cascades):
    """The document in device.json."""

    schema: int
    bundle: BundleId
    device: jetson.JetsonState
    runtime: str  # runtime of the first row
    library: str  # version of that runtime
    libraries: Dict[str, str]  # runtime -> version
    names: List[str]  # class names in the order of their index
    imgsz: List[int]  # [height, width] of the input, px
    power_from: Optional[str]  # the meter of `power_w`
    rows: List[Union[MeasuredRow, MissingRow]]
    golden: Worst


def table(document: Document) -> str:
    """Format the measured rows as a text table."""
    heads = ("engine", "mAP50-95", "p50 ms", "p99 ms", "all p50 ms", "fps", "MiB", "W", "mJ", "golden")
    lines: List[Tuple[str, ...]] = [heads]
    for row in document["rows"]:
        if row["status"] == "ok":
            figures = (
                row["map50_95"],
                row["latency_p50_ms"],
                row["latency_p99_ms"],
                row["end_to_end_p50_ms"],
                row["fps"],
                row["memory_mib"],
                row["power_w"],
                row["energy_mj_per_frame"],
            )
            lines.append((f"{row['runtime']}-{row['precision']}", *_numbers(figures), _verdict(row)))
    return _aligned(lines)


def cascade_table(cascades: Sequence[CascadeRow]) -> str:
    """Format the rows of cascades as a text table, with a note about p99. Latencies are from a decoded image to its detections."""
    heads = (
        "cascade",
        "mAP50-95",
        "small alone",
        "mean ms",
        "p50 ms",
        "p99 ms",
        "small ms",
        "large ms",
        "fps",
        "golden",
    )
    lines: List[Tuple[str, ...]] = [heads]
    for row in cascades:
        latency = (row["mean_ms"], row["p50_ms"], row["p99_ms"], row["small_ms"], row["large_ms"], row["fps"])
        share = f"{row['kept']:.1%}"
        lines.append(
            (f"{row['runtime']}-{CASCADE}", *_numbers([row["map50_95"]]), share, *_numbers(latency), _verdict(row))
        )
    return (
        f"{_aligned(lines)}\nSmall alone is the share of images that the large model does not see. The others go through both, so "
        "p99 is about the sum of both."
    )


def _numbers(values: Sequence[Optional[float]]) -> List[str]:
    return ["-" if value is None else f"{value:.4g}" for value in values]


def _verdict(row: Subject) -> str:
    return "passed" if row["golden"]["passed"] else f"FAILED: {row['golden']['reason']}"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(cells[i]) for cells in lines) for i in range(len(lines[0]) - 1)] + [0]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip() for cells in lines)
