"""`python3 detect.py SOURCE`: print detections as JSON lines, from an image, a folder, a video, a camera (its number) or a .npy."""

from __future__ import annotations

import errno
import json
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import IO, Any, Callable, List, Optional, Sequence

from ..detect.draw import line, write_drawing
from ..detect.sources import open_source
from ..detect.stream import ImageDetections, open_pipeline
from ..errors import DISK, SourceError
from .bundle import HERE, Bundle, engine_folder, open_bundle, outside
from .command_line import Parser, answer, positive, run_command, say

SHADOW_SCHEMA = 1


def main(argv: Optional[Sequence[str]] = None, directory: Path = HERE) -> int:
    """Detect until the source ends or Ctrl-C is pressed, and return the exit code.

    Exit code 3: an image could not be read, a camera was lost, or a video is truncated. Exit code 6: stdout or the shadow log could
    not be written.
    """
    parser = Parser(prog="detect.py", description=__doc__)
    parser.add_argument("source", help="image, folder, video, number of a camera, or an address with ://")
    parser.add_argument(
        "--engine", help="name in engines/ (tensorrt-int8), or path of an engine or cascade (default: the fastest one)"
    )
    parser.add_argument(
        "--engines", type=positive, help="engines that run in parallel (default: one per processor, one on a GPU)"
    )
    parser.add_argument("--conf", type=_share, default=0.25, help="minimum score (default 0.25)")
    parser.add_argument(
        "--iou",
        type=_share,
        default=0.7,
        help="IoU above which the worse box is removed (default 0.7; no effect on YOLO26)",
    )
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="write images with drawn boxes to this folder")
    parser.add_argument(
        "--shadow", type=Path, metavar="FILE", help="append one line per frame, for yolo-compress rollout"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="stop after N images")
    parser.add_argument("--quiet", action="store_true", help="no lines on stdout")
    options = parser.parse_args(argv)
    return run_command(lambda: _detect(open_bundle(directory), options))


def _detect(bundle: Bundle, options: Any) -> int:
    for option, path in (("--shadow", options.shadow), ("--draw", options.draw)):
        if path is not None:
            outside(bundle, path, option)
    engine = engine_folder(bundle, options.engine)
    source = open_source(options.source)
    engines = options.engines or (1 if source.total == 1 else None)  # opening more takes time
    say(f"{bundle.name} {bundle.version}, engine {engine.name}")
    unreadable, first = 0, None
    with ExitStack() as stack:
        shadow = None if options.shadow is None else stack.enter_context(ShadowLog(options.shadow, bundle))
        outlets = _outlets(bundle, options, shadow)
        pipeline = stack.enter_context(open_pipeline(engine, engines, options.conf, options.iou, bundle.max_det))
        stream = stack.enter_context(closing(pipeline(source.images)))
        for number, found in enumerate(stream, 1):
            for write in outlets:
                write(found)
            if found.problem is not None:
                unreadable, first = unreadable + 1, first or found.problem
            if number == options.limit:
                break
    if unreadable:
        raise SourceError(f"{unreadable} images could not be read, the first: {first}")
    if shadow is not None and shadow.lost:
        raise OSError(errno.EIO, f"{shadow.lost} lines could not be written", str(shadow.path))
    return 0


def _outlets(bundle: Bundle, options: Any, shadow: "Optional[ShadowLog]") -> List[Callable[[ImageDetections], None]]:
    """Return the functions that write the result of each image: to stdout, to the shadow log, and as a drawing."""
    outlets: List[Callable[[ImageDetections], None]] = []
    if not options.quiet:
        outlets.append(lambda found: answer(line(found, bundle.names)))
    if shadow is not None:
        outlets.append(shadow.write)
    if options.draw is not None:
        options.draw.mkdir(parents=True, exist_ok=True)
        outlets.append(lambda found: _draw(options.draw, bundle, found))
    return outlets


class ShadowLog:
    """The log file of the option `--shadow`, used in a `with` block. A failing disk is reported once, and detection continues.

    Attributes:
        lost: number of lines that could not be written. `yolo-compress rollout` counts these frames as missing.

    Raises:
        OSError: the file cannot be opened for a reason other than a full or failing disk.
    """

    def __init__(self, path: Path, bundle: Bundle) -> None:
        self.path, self.lost = path, 0
        self._bundle, self._torn = bundle, False
        self._file: Optional[IO[bytes]] = None
        try:
            self._open()
        except OSError as error:
            if error.errno not in DISK:
                raise

    def write(self, found: ImageDetections) -> None:
        """Write the detections in one image as a line of the log, unbuffered."""
        line = shadow_line(found, self._bundle.name, self._bundle.version, time.time()) + "\n"
        data = (("\n" if self._torn else "") + line).encode("utf-8")
        try:
            self._torn = (self._file or self._open()).write(data) < len(data)
            problem = "only part of a line was written" if self._torn else None
        except OSError as error:
            problem = error.strerror
        if problem is not None:
            if not self.lost:
                say(f"{self.path}: {problem}; detection continues, these lines of the log are lost")
            self.lost += 1

    def _open(self) -> IO[bytes]:
        self._file = open(str(self.path), "ab", buffering=0)
        return self._file

    def __enter__(self) -> "ShadowLog":
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._file is not None:
            self._file.close()


def shadow_line(found: ImageDetections, name: str, version: int, at: float) -> str:
    """Return one line of the shadow log, which `yolo-compress rollout` reads.

    A detection is x1, y1, x2, y2 in px of the frame, then score and class index.

    Args:
        at: time of the frame, in seconds since the epoch.
    """
    boxes = [
        [round(side, 2) for side in row[:4]] + [round(row[4], 5), int(row[5])] for row in found.detections_N6.tolist()
    ]
    return json.dumps(
        {
            "schema": SHADOW_SCHEMA,
            "frame": found.name,
            "at": round(at, 6),
            "model": {"name": name, "version": version},
            "ms": round(found.ms, 3),
            "detections": boxes,
            "problem": found.problem,
        }
    )


def _draw(folder: Path, bundle: Bundle, found: ImageDetections) -> None:
    if found.image_HW3 is not None:
        name = Path(found.name).name.replace("#", "-")
        write_drawing(folder / f"{name}.jpg", found.image_HW3, found.detections_N6, bundle.names)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError(text)
    return value
