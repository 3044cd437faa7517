"""The pipeline gives what one picture at a time gives, in order, and no fault in any thread leaves it hanging."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from yolo_compress.runtime.detect import stream as module
from yolo_compress.runtime.detect.detector import Detector
from yolo_compress.runtime.detect.pre import UnreadableImage, read_image
from yolo_compress.runtime.detect.sources import SourceImage, open_source
from yolo_compress.runtime.detect.stream import Pipeline
from yolo_compress.runtime.errors import NotFinite, RuntimeUnavailable, SourceError

IMGSZ = (32, 32)


class Engine:
    """One box a picture, as large as its mean is bright; takes a while that differs from call to call."""

    needs_nms = True
    names, imgsz = ("bolt", "nut"), IMGSZ

    def __init__(self, batch: int | None = 1, fault: BaseException | None = None) -> None:
        self.batch, self.channels, self.fault = batch, 3, fault
        self.threads, self.shapes, self.closed = {threading.get_ident()}, list[int](), False

    def __call__(self, images_BCHW: np.ndarray, copy: bool = True) -> np.ndarray:
        assert not self.closed
        self.threads.add(threading.get_ident())
        self.shapes.append(len(images_BCHW))
        mean = images_BCHW.mean(axis=(1, 2, 3))
        time.sleep(float(mean[0]) % 0.002)
        if self.fault is not None and len(self.shapes) == 3:
            raise self.fault
        output = np.zeros((len(images_BCHW), 6, 4), np.float32)
        output[:, :4, 1], output[:, 5, 1] = 16 * mean[:, None], 0.5
        return output

    def __exit__(self, *exception: Any) -> None:
        self.threads.add(threading.get_ident())
        self.closed = True


def shades(count: int) -> list[SourceImage]:
    return [SourceImage(f"p{i}", partial(np.full, (32, 48, 3), 255 - 4 * i, np.uint8)) for i in range(count)]


def unreadable(name: str) -> SourceImage:
    def read() -> np.ndarray:
        raise UnreadableImage(f"{name}: torn")

    return SourceImage(name, read)


def opened(engines: list[Engine], **kind: Any) -> Pipeline:
    def one() -> Engine:
        engines.append(Engine(**kind))
        return engines[-1]

    return Pipeline([one] * 2)


def no_threads_left() -> bool:
    return not [thread for thread in threading.enumerate() if thread.name.startswith(module.NAME)]


@pytest.mark.parametrize("batch", [1, None, 3])
def test_it_is_one_at_a_time_in_order(batch: int | None) -> None:
    pictures, engines = shades(23), list[Engine]()
    alone = Detector(Engine(), 0.25, multi_label=False)  # type: ignore[arg-type]
    with opened(engines, batch=batch) as pipeline:
        for _ in range(2):  # and it can be called again
            found = list(pipeline(iter(pictures)))
            assert [result.name for result in found] == [picture.name for picture in pictures]
            for picture, result in zip(pictures, found, strict=True):
                assert np.array_equal(result.detections_N6, alone(picture.read())) and len(result.detections_N6) == 1
                assert result.image_HW3 is not None and result.problem is None and result.ms > 0
    assert len(engines) == 2 and all(engine.closed and len(engine.threads) == 1 for engine in engines)
    assert {size for engine in engines for size in engine.shapes} == {batch or 1} and no_threads_left()


@pytest.mark.parametrize("batch", [1, 3])
def test_a_picture_that_cannot_be_read_is_named_and_costs_no_other(batch: int) -> None:
    whole = shades(7)
    pictures = [
        unreadable("first"),
        *whole[:3],
        unreadable("middle"),
        *whole[3:],
        unreadable("last"),
        unreadable("end"),
    ]
    with opened([], batch=batch) as pipeline:
        found, expected = list(pipeline(pictures)), list(pipeline(whole))
    assert [result.problem for result in found if result.image_HW3 is None] == [
        f"{name}: torn" for name in ("first", "middle", "last", "end")
    ]
    read = [result for result in found if result.problem is None]
    assert [result.name for result in read] == [picture.name for picture in whole]
    assert all(np.array_equal(a.detections_N6, b.detections_N6) for a, b in zip(read, expected, strict=True))


def test_no_more_pictures_are_taken_than_are_in_work() -> None:
    taken = [0]

    def endless() -> Iterator[SourceImage]:
        for picture in shades(10) * 1000:
            taken[0] += 1
            yield picture

    with opened([]) as pipeline:
        stream = pipeline(endless())
        for given in range(1, 30):
            next(stream)
            time.sleep(0.001)
            assert taken[0] - given <= module.AHEAD * (2 + module.SPARE_TASKS)
        stream.close()
    assert no_threads_left()


class Fault(Exception):
    pass


def broken_decoder() -> Iterator[SourceImage]:
    def read() -> np.ndarray:
        raise Fault("decoder")

    yield from [*shades(5), SourceImage("bad", read), *shades(50)]


def broken_source() -> Iterator[SourceImage]:
    yield from shades(5)
    raise Fault("source")


@pytest.mark.parametrize("pictures", [broken_decoder, broken_source])
def test_an_error_of_any_thread_ends_the_run(pictures: Any) -> None:
    with pytest.raises(Fault), opened([]) as pipeline:
        list(pipeline(pictures()))
    assert no_threads_left()


@pytest.mark.parametrize("fault", [Fault("engine"), KeyboardInterrupt()])
def test_an_error_of_the_engine_ends_the_run(fault: BaseException) -> None:
    engines: list[Engine] = []
    with pytest.raises(type(fault)), opened(engines, fault=fault) as pipeline:
        list(pipeline(shades(50)))
    assert all(engine.closed for engine in engines) and no_threads_left()


def test_an_engine_that_does_not_open_closes_the_others() -> None:
    first = Engine()

    def refuses() -> Engine:
        raise Fault("engine")

    with pytest.raises(Fault):
        Pipeline([lambda: first, refuses])
    assert first.closed and no_threads_left()


def test_an_output_that_is_not_finite_names_the_picture() -> None:
    class Broken(Engine):
        def __call__(self, images_BCHW: np.ndarray, copy: bool = True) -> np.ndarray:
            return super().__call__(images_BCHW) * np.float32(np.nan)

    with pytest.raises(NotFinite, match="p0: .*NaN"), Pipeline([Broken]) as pipeline:
        list(pipeline(shades(3)))


# ---- sources


def test_a_folder_gives_its_images_by_name(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "c.jpeg"):
        Image.new("RGB", (8, 6), (255, 0, 0)).save(tmp_path / name)
    (tmp_path / "a.txt").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    source = open_source(tmp_path)
    pictures = list(source.images)
    assert source.total == 3 and [Path(picture.name).name for picture in pictures] == ["a.JPG", "b.png", "c.jpeg"]
    assert pictures[1].read()[0, 0].tolist() == [255, 0, 0]
    assert [picture.name for picture in open_source(tmp_path / "b.png").images] == [str(tmp_path / "b.png")]


def film(file: Path, frames: int) -> Path:
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))  # type: ignore[attr-defined]
    for i in range(frames):
        writer.write(np.full((48, 64, 3), (0, 0, 40 * i), np.uint8))
    writer.release()
    return file


def test_a_video_gives_its_frames_as_rgb(tmp_path: Path) -> None:
    source = open_source(film(tmp_path / "film.avi", 5))
    pictures = list(source.images)
    assert source.total == 5 and [picture.name for picture in pictures] == [f"film.avi#{i}" for i in range(5)]
    for i, picture in enumerate(pictures):
        assert np.abs(picture.read()[24, 32].astype(int) - [40 * i, 0, 0]).max() <= 6


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "film.avi").write_bytes(b"no film")
    (tmp_path / "empty").mkdir()
    for source, words in {"gone.jpg": "no such file", "empty": "holds no image", "film.avi": "cannot open it"}.items():
        with pytest.raises(SourceError, match=f"{source}: {words}|{source}: OpenCV .* {words}"):
            open_source(tmp_path / source)
    with pytest.raises(SourceError, match="camera 99: OpenCV .* cannot open it"):
        open_source("99")


def test_a_video_needs_opencv_and_an_image_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    file = film(tmp_path / "film.avi", 1)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(RuntimeUnavailable, match="film.avi: videos and cameras need OpenCV.*pip install opencv"):
        open_source(file)
    assert next(open_source(tmp_path / "a.png").images).read().shape == (6, 8, 3)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_files_that_end_early_are_unreadable(suffix: str, tmp_path: Path) -> None:
    """opencv would give the missing part in grey."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    file = tmp_path / f"a.{suffix}"
    noise.save(file)
    whole = file.read_bytes()
    assert read_image(file).shape == (64, 64, 3)
    file.write_bytes(whole + b"\0" * 64)  # padding is no fault
    assert read_image(file).shape == (64, 64, 3)
    file.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(UnreadableImage, match=f"a.{suffix}: the file ends before"):
        read_image(file)


def test_the_end_of_a_thumbnail_is_not_the_end(tmp_path: Path) -> None:
    import io

    thumbnail, noise = io.BytesIO(), np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.new("RGB", (8, 8)).save(thumbnail, "JPEG")
    Image.fromarray(noise).save(tmp_path / "a.jpg", comment=thumbnail.getvalue())
    whole = (tmp_path / "a.jpg").read_bytes()
    assert whole.count(b"\xff\xd9") == 2 and read_image(tmp_path / "a.jpg").shape == (64, 64, 3)
    (tmp_path / "a.jpg").write_bytes(whole[:-100])
    with pytest.raises(UnreadableImage, match=r"a\.jpg: the file ends before"):
        read_image(tmp_path / "a.jpg")
