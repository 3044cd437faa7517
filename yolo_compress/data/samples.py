"""Images with their boxes: `Sample` is one, `Samples` are many in few arrays, because COCO has 118,287."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, overload

if TYPE_CHECKING:
    import numpy as np

    from yolo_compress.runtime.measure.labels import Box


@dataclass(frozen=True)
class Sample:
    """One image with its boxes. Width and height are in px as `cv2.imread` decodes it; boxes are (class, cx, cy, w, h), 0..1."""

    image: Path
    width: int
    height: int
    boxes: tuple[Box, ...]
    sha256: str
    name: str = ""  # path relative to the data root, with slashes; part of the digest


@dataclass(frozen=True, eq=False)
class Samples(Sequence[Sample]):
    """A sequence of samples. A `Sample` is made when it is asked for.

    Attributes:
        paths: path of each image.
        names: path of each image relative to the data root.
        sizes_N2: width and height of each image, px.
        sha256_N32: SHA-256 of each image file, uint8.
        starts: index of the first box of each image in `boxes_B5`, and the number of boxes at the end; N + 1 numbers.
        boxes_B5: class, cx, cy, w, h of all boxes, float64.
    """

    paths: list[str]
    names: list[str]
    sizes_N2: np.ndarray
    sha256_N32: np.ndarray
    starts: np.ndarray
    boxes_B5: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Sample, ...]: ...

    def __getitem__(self, index: int | slice) -> Sample | tuple[Sample, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        path, i = self.paths[index], range(len(self))[index]
        rows = self.boxes_B5[self.starts[i] : self.starts[i + 1]].tolist()
        boxes = tuple((int(k), x, y, w, h) for k, x, y, w, h in rows)
        width, height = self.sizes_N2[i].tolist()
        return Sample(Path(path), width, height, boxes, self.sha256_N32[i].tobytes().hex(), self.names[i])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(Sample.__eq__, self, other))

    def only(self, chosen: Sequence[int]) -> Samples:
        """Return the samples with these indices."""
        import numpy as np

        counts = self.counts()[chosen]
        rows = [np.arange(self.starts[i], self.starts[i + 1]) for i in chosen]
        return Samples(
            [self.paths[i] for i in chosen],
            [self.names[i] for i in chosen],
            self.sizes_N2[chosen],
            self.sha256_N32[chosen],
            np.concatenate([[0], np.cumsum(counts)]),
            self.boxes_B5[np.concatenate(rows)] if rows else self.boxes_B5[:0],
        )

    def counts(self) -> np.ndarray:
        """Return the number of boxes of each image."""
        return self.starts[1:] - self.starts[:-1]

    def boxes_of(self, classes: int) -> list[int]:
        """Return the number of boxes of each class."""
        import numpy as np

        return np.bincount(self.boxes_B5[:, 0].astype(np.int64), minlength=classes).tolist()

    def most_of_a_class(self) -> np.ndarray:
        """Return the largest number of boxes of one class in each image."""
        import numpy as np

        most_N = np.zeros(len(self), np.int64)
        images_B = np.repeat(np.arange(len(self)), self.counts())
        (images, _), counts = np.unique([images_B, self.boxes_B5[:, 0]], axis=1, return_counts=True)
        np.maximum.at(most_N, images.astype(np.int64), counts)
        return most_N


def sha256s(samples: Sequence[Sample]) -> list[str]:
    """Return the SHA-256 of each image file, hexadecimal. Unlike a loop, this makes no `Sample` of `Samples`."""
    if not isinstance(samples, Samples):
        return [sample.sha256 for sample in samples]
    text = samples.sha256_N32.tobytes().hex()
    return [text[i : i + 64] for i in range(0, len(text), 64)]


@dataclass(frozen=True)
class FileStates:
    """State of files of a data set when they were read. The stamp is 0 if the file did not exist, as a label file may.

    Attributes:
        stamps_N4: as from `cache.stamps`.
        sha256_N32: SHA-256 of each file, uint8.
    """

    paths: list[str]
    stamps_N4: np.ndarray
    sha256_N32: np.ndarray
