"""Detect objects in images with an engine, by the Python API: a JSON line per image.

python examples/detect.py weights/digits/engine/compressed/openvino-int8 datasets/digits/images/val/*.png
"""

import json
import sys

from yolo_compress import Detector, open_engine
from yolo_compress.runtime.detect.pre import read_image


def main(folder: str, *files: str) -> None:
    """Print the detections of each file.

    Args:
        folder: an engine, as the stage `engine` or a robot's `build.py` writes it.
        files: images that OpenCV or Pillow can read.
    """
    with open_engine(folder) as engine:
        detector = Detector(engine, conf=0.25, multi_label=False)
        for file in files:
            detections_N6 = detector(read_image(file))  # x1, y1, x2, y2 in px of the image, score, class
            found = [
                {"class": engine.names[int(label)], "score": round(score, 4), "box": [round(side, 1) for side in box]}
                for *box, score, label in detections_N6.tolist()
            ]
            print(json.dumps({"image": file, "detections": found}))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python detect.py ENGINE_FOLDER IMAGE ...")
    main(*sys.argv[1:])
