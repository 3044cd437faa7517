"""Environment of ultralytics, set before its first import: no installs, no network, no code from checkpoints.

Left alone, ultralytics installs packages at run time, asks the network for newer versions, sends usage events, and
unpickles arbitrary classes from a checkpoint. `harden()` is called by everything that imports it and is idempotent.
"""

import logging
import os
import sys

SETTINGS = {
    "YOLO_AUTOINSTALL": "false",  # a missing package is an error of ours, with a hint, not a pip call in the middle of a run
    "YOLO_OFFLINE": "1",  # no version checks, no events
    "ULTRALYTICS_SAFE_LOAD": "1",  # weights_only loading against ultralytics' allow-list of classes
    "YOLO_VERBOSE": "false",  # its bars and banners would interleave with ours; `let_warnings_through` undoes a part
    "WANDB_SILENT": "true",
    "ALBUMENTATIONS_OFFLINE": "1",
    "NO_ALBUMENTATIONS_UPDATE": "1",
}


def harden() -> None:
    """Set the environment. Raises RuntimeError when ultralytics was imported before, since it reads it at import."""
    if "ultralytics" in sys.modules and os.environ.get("ULTRALYTICS_SAFE_LOAD") != "1":
        raise RuntimeError(
            "ultralytics was imported before yolo_compress could set ULTRALYTICS_SAFE_LOAD; import ours first"
        )
    os.environ.update(SETTINGS)


def let_warnings_through() -> None:
    """After the import of ultralytics, which sets its logger's level."""
    logging.getLogger("ultralytics").setLevel(logging.WARNING)
