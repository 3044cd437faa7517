"""Set the environment of ultralytics before its first import: no installs, no network, no code from checkpoints.

By default ultralytics installs packages at run time, looks for newer versions on the network, sends usage events, and unpickles
arbitrary classes from a checkpoint. Every package that imports ultralytics calls `harden()` first. Repeated calls are harmless.
"""

import logging
import os
import sys

SETTINGS = {
    "YOLO_AUTOINSTALL": "false",  # we raise an error with a hint for a missing package, instead of calling pip during a run
    "YOLO_OFFLINE": "1",  # no version checks, no events
    "ULTRALYTICS_SAFE_LOAD": "1",  # weights_only loading against ultralytics' allow-list of classes
    "YOLO_VERBOSE": "false",  # its progress bars would mix with ours; `let_warnings_through` shows its warnings again
    "WANDB_SILENT": "true",
    "ALBUMENTATIONS_OFFLINE": "1",
    "NO_ALBUMENTATIONS_UPDATE": "1",
}


def harden() -> None:
    """Set the environment variables that stop ultralytics from installing packages, using the network and unpickling code.

    Raises:
        RuntimeError: ultralytics was imported earlier without these variables. It reads them only at import.
    """
    if "ultralytics" in sys.modules and os.environ.get("ULTRALYTICS_SAFE_LOAD") != "1":
        raise RuntimeError(
            "ultralytics was imported before yolo_compress could set ULTRALYTICS_SAFE_LOAD; import ours first"
        )
    os.environ.update(SETTINGS)


def let_warnings_through() -> None:
    """Make ultralytics log its warnings again. Call this after the import of ultralytics, since the import sets the log level."""
    logging.getLogger("ultralytics").setLevel(logging.WARNING)
