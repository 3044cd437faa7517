"""`python -m yolo_compress` is the command line."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from yolo_compress import ranks
from yolo_compress.cli.main import main


def end_process(code: int) -> NoReturn:
    """End this process with an exit code.

    A process of a training on several GPUs (a rank) exits without Python's shutdown. After a failed training, threads of gloo and NCCL
    may still run, and would make that shutdown crash.
    """
    if ranks.several():
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    end_process(main())
