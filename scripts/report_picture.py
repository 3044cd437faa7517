"""Make docs/report.png of a report.html: the verdict and the chart of mAP over latency, by headless Chromium.

python scripts/report_picture.py weights/digits/report/report.html docs/report.png
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from tests.support import chromium  # noqa: E402  (from the checkout)

WIDTH_PX = 1280
# Removes all but the verdict and the chart; gives the height in px of what is left.
CROP = """(() => {
  const chart = document.querySelector('#latency'), figure = document.querySelector('#latency ~ .figure');
  const keep = [chart, chart.nextElementSibling, figure];
  for (const part of document.querySelectorAll('nav, footer, main > *')) if (!keep.includes(part)) part.remove();
  chart.style.marginTop = '22px';
  return Math.ceil(figure.getBoundingClientRect().bottom) + 16 })()"""


def main() -> int:
    report, picture = map(Path, sys.argv[1:])
    program = chromium.find()
    if program is None:
        sys.exit(f"none of {', '.join(chromium.PROGRAMS)} is installed")
    with tempfile.TemporaryDirectory() as profile, chromium.browser(program, Path(profile)) as tab:
        tab.open(report.resolve(), WIDTH_PX, "light")
        height_px = tab.value(CROP)
        tab.picture(picture, {"x": 0, "y": 0, "width": WIDTH_PX, "height": height_px})
    return 0


if __name__ == "__main__":
    sys.exit(main())
