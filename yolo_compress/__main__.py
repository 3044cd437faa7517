"""`python -m yolo_compress`: the same as `yolo-compress`."""

import sys

from yolo_compress.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
