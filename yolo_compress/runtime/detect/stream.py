"""Pipeline for many images: decoding, letterbox, inference and NMS of different images run in parallel.

A task processes a batch of images (one, unless the engine's batch is larger) in a thread of a pool, from file to detections. The
task borrows an idle engine for the inference. There are more tasks than engines: tasks without an engine decode or run NMS. On a
CPU, several engines with few threads are faster than one engine with many, because a layer does not scale well over threads.
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

from ..backends.base import Backend, is_policy
from ..engine import on_gpu, open_engine
from ..errors import NotFinite, SourceError
from ..max_detections import MAX_DET
from ..measure.device import usable_cpus
from .cascade import CascadeEngine, Policy
from .cascade import engines as engines_of
from .detector import Detector
from .pre import Canvas, UnreadableImage
from .sources import SourceImage

MAX_ENGINES = 4  # default limit, since each engine holds the weights and its activations
SPARE_TASKS = 1  # tasks in addition to one per engine
NAME = "yolo_compress.pipeline"  # name of the threads
AHEAD = 2  # limit of batches per task that are waiting, in progress, or done and not yet consumed


class ImageDetections(NamedTuple):
    """Detections in one image, or the reason why the image could not be read.

    Attributes:
        name: name of the image.
        image_HW3: (H, W, 3) uint8 RGB array. None: the image could not be read.
        detections_N6: (N, 6) array, columns x1, y1, x2, y2 in px of the image, score, class.
        problem: the reason why the image could not be read. None: it was read.
        ms: time from reading the file (for a video: from the decoded frame) to the detections, milliseconds.
    """

    name: str
    image_HW3: Optional[np.ndarray]
    detections_N6: np.ndarray
    problem: Optional[str]
    ms: float


class Lender:
    """Several engines that many threads share as one backend: a call borrows an idle engine.

    Each engine has its own thread that opens, runs and closes it, because a CUDA context of pycuda belongs to a thread.
    """

    def __init__(self, opens: Sequence[Callable[[], Any]]) -> None:
        self._stack = ExitStack()
        self._idle: "SimpleQueue[Tuple[ThreadPoolExecutor, Backend]]" = SimpleQueue()
        with ExitStack() as stack:
            for opening in opens:
                thread = stack.enter_context(ThreadPoolExecutor(1, NAME))
                backend = thread.submit(opening).result()
                stack.callback(partial(_close_in_thread, thread, backend))
                self._idle.put((thread, backend))
            self._stack = stack.pop_all()
        self.names, self.imgsz = backend.names, backend.imgsz
        self.batch, self.channels = backend.batch, backend.channels
        self.needs_nms = backend.needs_nms

    def __call__(self, images_BCHW: np.ndarray) -> np.ndarray:
        thread, backend = self._idle.get()
        try:
            return thread.submit(backend, images_BCHW).result()
        finally:
            self._idle.put((thread, backend))

    def close(self) -> None:
        """Close every engine in its thread, after its current inference."""
        self._stack.close()


def _close_in_thread(thread: ThreadPoolExecutor, backend: Backend) -> None:
    thread.submit(backend.__exit__, None, None, None).result()


class Shared:
    """A detector that several threads share: each call borrows an input array and an idle engine.

    Args:
        detector: its backend must be a `Lender`, or a `CascadeEngine` of two.
        threads: number of threads.
    """

    def __init__(self, detector: Detector, threads: int) -> None:
        self._steps = detector
        self._large = None if detector.large is None else Shared(detector.large, threads)
        self._canvases: "SimpleQueue[Canvas]" = SimpleQueue()  # one per thread, borrowed like the engines
        for _ in range(threads):
            self._canvases.put(detector.blank())

    def detect(self, images: Sequence[np.ndarray]) -> List[np.ndarray]:
        """Return the detections of each image, as `Detector.detect` does."""
        found: List[np.ndarray] = []
        size = self._steps.backend.batch or 1
        for start in range(0, len(images), size):
            found += self._one_inference(images[start : start + size])
        return found

    def _one_inference(self, images: Sequence[np.ndarray]) -> List[np.ndarray]:
        canvas = self._canvases.get()
        try:
            input_BCHW, placed = self._steps.prepare(images, canvas)
            output_BCA = self._steps.backend(input_BCHW)
        finally:
            self._canvases.put(canvas)
        if self._large is None:
            return self._steps.found(output_BCA, placed)
        return self._steps.completed(images, output_BCA, placed, self._large.detect)


class Pipeline:
    """Detect objects in many images with several engines in parallel. Use it in a `with` block, which closes the engines.

    A call with images yields the results in order while later images are processed. `open_pipeline` makes a pipeline.

    Args:
        opens: functions without arguments. Each opens one engine. All engines run in parallel. For a cascade, the small engines.
        conf, iou, max_det, multi_label: see `post.nms`. The defaults suit a deployment.
        opens_large: functions that open the large engines of a cascade, as many as `opens`.
        policy: the cascade's policy. None: there is no cascade.
    """

    def __init__(
        self,
        opens: Sequence[Callable[[], Any]],
        conf: float = 0.25,
        iou: float = 0.7,
        max_det: int = MAX_DET,
        multi_label: bool = False,
        opens_large: Sequence[Callable[[], Any]] = (),
        policy: Optional[Policy] = None,
    ) -> None:
        with ExitStack() as stack:
            self.backend = backend = Lender(opens)
            stack.callback(backend.close)
            if policy is not None:
                large = Lender(opens_large)
                stack.callback(large.close)
                backend = CascadeEngine(backend, large, policy)  # type: ignore[arg-type,assignment]
            self._engines = stack.pop_all()
        self._threads = len(opens) + SPARE_TASKS
        self._shared = Shared(Detector(backend, conf, iou, max_det, multi_label), self._threads)  # type: ignore[arg-type]
        self._tasks = ThreadPoolExecutor(self._threads, NAME)

    def __call__(self, images: Iterable[SourceImage]) -> Generator[ImageDetections, None, None]:
        """Yield the result of each image in order. An error in a thread is raised in place of the image's result, and ends the work.

        Raises:
            NotFinite: the output for an image holds NaN or infinity.
            SourceError: the source failed. The results of the images before it are yielded first.
        """
        left = iter(images)
        waiting: Deque[Future[List[ImageDetections]]] = deque()
        lost: Optional[SourceError] = None
        try:
            while lost is None:
                batch: List[SourceImage] = []
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

    def _task(self, batch: Sequence[SourceImage]) -> List[ImageDetections]:
        """Process one batch of images from file to detections."""
        start = time.perf_counter()
        read = [_read(source) for source in batch]
        readable = [image for image, _ in read if image is not None]
        found = iter(self._detected(readable, batch) if readable else [])
        ms = (time.perf_counter() - start) * 1e3
        nothing = np.zeros((0, 6), np.float32)
        return [
            ImageDetections(source.name, image, nothing if image is None else next(found), problem, ms)
            for source, (image, problem) in zip(batch, read)
        ]

    def _detected(self, images: Sequence[np.ndarray], batch: Sequence[SourceImage]) -> List[np.ndarray]:
        try:
            return self._shared.detect(images)
        except NotFinite as error:
            raise NotFinite(f"{', '.join(source.name for source in batch)}: {error}") from error

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._tasks.shutdown()
        self._engines.close()


def _read(source: SourceImage) -> Tuple[Optional[np.ndarray], Optional[str]]:
    """Return the image and None, or None and the reason why it cannot be read."""
    try:
        return source.read(), None
    except UnreadableImage as error:
        return None, str(error)


def open_pipeline(
    engine: Union[str, Path],
    engines: Optional[int] = None,
    conf: float = 0.25,
    iou: float = 0.7,
    max_det: int = MAX_DET,
) -> Pipeline:
    """Return a `Pipeline` with one or more copies of an engine.

    Args:
        engine: engine directory, or the policy folder of a cascade.
        engines: number of copies that run in parallel and share the processors. None: one on a GPU, else one per processor, at most
            4.
        conf, iou, max_det: thresholds and limit of NMS, see `post.nms`.

    Raises:
        EngineError: `load_info` rejects the files, which are checked before an engine library reads them.
        RuntimeUnavailable: the library or device is missing.
    """
    gpu = on_gpu(engine)
    count = engines or (1 if gpu else min(usable_cpus(), MAX_ENGINES))
    threads = None if gpu else max(usable_cpus() // count, 1)
    if not is_policy(Path(engine)):
        return Pipeline([partial(open_engine, engine, threads)] * count, conf, iou, max_det)
    policy, parts = engines_of(Path(engine))
    small, large = ([partial(open_engine, path, threads, info.onnx_sha256)] * count for path, info in parts)
    return Pipeline(small, conf, iou, max_det, opens_large=large, policy=policy)
