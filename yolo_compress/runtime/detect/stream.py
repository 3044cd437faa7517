"""Many pictures through an engine: decoding, letterbox, inference and NMS of different pictures at the same time.

A task takes a batch of pictures (one, unless the engine's batch is larger) from file to detections in a thread of a pool, and
borrows an idle engine for the inference. There are more tasks than engines, so the others decode or suppress meanwhile.
On a CPU several engines of few threads beat one of many: a network's layers do not divide among processors without loss.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Callable, Deque, Generator, Iterable, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np

from ..backends.base import Backend, load_info
from ..engine import open_engine
from ..errors import NotFinite, SourceError
from ..limits import MAX_DET
from ..measure.device import usable_cpus
from ..registry import RUNTIMES
from .detector import Detector
from .pre import Canvas, UnreadableImage
from .sources import Picture

MAX_ENGINES = 4  # unless more are asked for: each holds the weights and its activations
SPARE_TASKS = 1  # beyond one an engine
NAME = "yolo_compress.pipeline"  # of its threads
AHEAD = 2  # batches a task that are held at most, waiting, in work, or done and not yet asked for


class Found(NamedTuple):
    """What came of a picture.

    Attributes:
        name: of the picture.
        image_HW3: uint8 RGB; None where it could not be read.
        detections_N6: xyxy in px of the image, score, class.
        problem: why it could not be read, or None.
        ms: from the first byte of its file (of a video: from its decoded frame) to its detections.
    """

    name: str
    image_HW3: Optional[np.ndarray]
    detections_N6: np.ndarray
    problem: Optional[str]
    ms: float


class Lender:
    """Engines as one backend for many threads: a call borrows an idle one.

    Each engine is opened, run and closed by a thread of its own, as a CUDA context of pycuda belongs to a thread.
    """

    def __init__(self, opens: Sequence[Callable[[], Any]]) -> None:
        self._stack = ExitStack()
        self._idle: "SimpleQueue[Tuple[ThreadPoolExecutor, Backend]]" = SimpleQueue()
        with ExitStack() as stack:
            for opening in opens:
                thread = stack.enter_context(ThreadPoolExecutor(1, NAME))
                backend = thread.submit(opening).result()
                stack.callback(partial(_closed, thread, backend))
                self._idle.put((thread, backend))
            self._stack = stack.pop_all()
        self.names, self.imgsz = backend.names, backend.imgsz
        self.batch, self.channels = backend.batch, backend.channels

    def __call__(self, images_BCHW: np.ndarray) -> np.ndarray:
        thread, backend = self._idle.get()
        try:
            return thread.submit(backend, images_BCHW).result()
        finally:
            self._idle.put((thread, backend))

    def close(self) -> None:
        """Close every engine in its thread, after what it is at."""
        self._stack.close()


def _closed(thread: ThreadPoolExecutor, backend: Backend) -> None:
    thread.submit(backend.__exit__, None, None, None).result()


class Pipeline:
    """A context manager; called with pictures, it gives what came of each, in their order, while later ones are in work.

    Args:
        opens: what opens an engine, one call for each that is to run at a time; see `open_pipeline`.
        conf, iou, max_det, multi_label: see `post.nms`; the defaults are those of a deployment.
    """

    def __init__(
        self,
        opens: Sequence[Callable[[], Any]],
        conf: float = 0.25,
        iou: float = 0.7,
        max_det: int = MAX_DET,
        multi_label: bool = False,
    ) -> None:
        self.backend = Lender(opens)
        self._steps = Detector(self.backend, conf, iou, max_det, multi_label)  # type: ignore[arg-type]
        self._threads = len(opens) + SPARE_TASKS
        self._tasks = ThreadPoolExecutor(self._threads, NAME)
        self._canvases: "SimpleQueue[Canvas]" = SimpleQueue()  # one a thread, lent like the engines
        for _ in range(self._threads):
            self._canvases.put(self._steps.blank())

    def __call__(self, pictures: Iterable[Picture]) -> Generator[Found, None, None]:
        """Yields in order. What goes wrong in any thread is raised here, at the picture's turn, and ends the work.

        Raises:
            NotFinite: names the picture.
            SourceError: the pictures ended with it; what came of those before it is yielded first.
        """
        left = iter(pictures)
        waiting: Deque[Future[List[Found]]] = deque()
        lost: Optional[SourceError] = None
        try:
            while lost is None:
                batch: List[Picture] = []
                try:
                    batch.extend(islice(left, self.backend.batch or 1))
                except SourceError as error:
                    lost = error
                if not batch:
                    break
                waiting.append(self._tasks.submit(self._task, batch))
                while waiting and (len(waiting) >= AHEAD * self._threads or waiting[0].done()):
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
            if lost is not None:
                raise lost
        finally:
            for future in waiting:
                future.cancel()

    def _task(self, batch: Sequence[Picture]) -> List[Found]:
        """From file to detections."""
        start = time.perf_counter()
        read = [_read(picture) for picture in batch]
        readable = [image for image, _ in read if image is not None]
        found = iter(self._detected(readable, batch) if readable else [])
        ms = (time.perf_counter() - start) * 1e3
        nothing = np.zeros((0, 6), np.float32)
        return [
            Found(picture.name, image, nothing if image is None else next(found), problem, ms)
            for picture, (image, problem) in zip(batch, read)
        ]

    def _detected(self, images: Sequence[np.ndarray], batch: Sequence[Picture]) -> List[np.ndarray]:
        canvas = self._canvases.get()
        try:
            input_BCHW, placed = self._steps.prepare(images, canvas)
            return self._steps.found(self.backend(input_BCHW), placed)
        except NotFinite as error:
            raise NotFinite(f"{', '.join(picture.name for picture in batch)}: {error}") from error
        finally:
            self._canvases.put(canvas)

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._tasks.shutdown()
        self.backend.close()


def _read(picture: Picture) -> Tuple[Optional[np.ndarray], Optional[str]]:
    """The image, or why there is none."""
    try:
        return picture.read(), None
    except UnreadableImage as error:
        return None, str(error)


def open_pipeline(
    engine: Union[str, Path],
    engines: Optional[int] = None,
    conf: float = 0.25,
    iou: float = 0.7,
    max_det: int = MAX_DET,
) -> Pipeline:
    """A pipeline of an engine directory.

    Args:
        engines: how many of it run at a time, sharing the processors; default one a processor, at most 4, and one on a GPU.
        conf, iou, max_det: see `post.nms`.

    Raises:
        EngineError: see `load_info`; nothing is deserialised then.
        RuntimeUnavailable: the library or device is missing.
    """
    on_gpu = RUNTIMES[load_info(Path(engine)).runtime].gpu
    count = engines or (1 if on_gpu else min(usable_cpus(), MAX_ENGINES))
    threads = None if on_gpu else max(usable_cpus() // count, 1)
    return Pipeline([partial(open_engine, engine, threads)] * count, conf, iou, max_det)
