"""`python -m yolo_compress` is the command line."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from yolo_compress import ranks
from yolo_compress.cli.main import main


def end_process(code: int) -> NoReturn:
    """End this process with an exit code.

    A rank ends at once. Threads of gloo and NCCL may outlive a training that failed, and would abort the interpreter's own end.
    """
    if ranks.several():
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    end_process(main())
