"""Run the command line: `python -m yolo_compress` does the same as the command `yolo-compress`."""

import sys

from yolo_compress.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
