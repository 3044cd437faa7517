"""The report in a real browser, in two widths, light and dark: it fits the window, loads nothing and logs no errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import chromium
from tests.support.report_case import EVIL, ab, device, item, row, rows, stage, whole
from yolo_compress.report import devices
from yolo_compress.report.write import write

PROGRAM = chromium.find()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason=f"none of {', '.join(chromium.PROGRAMS)} is installed"),
]
LONG = "a-class-name-without-any-space-in-it-" * 3
VISITS = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]

# Elements wider than the window that are not inside a scrolling box.
OUTSIDE = """[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1
  && !e.closest('.scroll, nav, pre, svg')).map(e => e.outerHTML.slice(0, 120))"""
# Text of a chart that is cut off at the edge.
CLIPPED = """[...document.querySelectorAll('.figure svg text')].filter(t => { const a = t.getBoundingClientRect(),
  b = t.ownerSVGElement.getBoundingClientRect(); return a.width && (a.right > b.right + 2 || a.left < b.left - 2) })
  .map(t => t.textContent)"""
# WCAG AA requires a contrast of 4.5 between text and background.
CONTRAST = """(() => {
  const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b };
  const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (!/^rgba.*, 0\\)$/.test(c)) return c } return 'rgb(255,255,255)' };
  const own = e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  return [...document.querySelectorAll('body *')].filter(e => !e.closest('svg') && own(e)).map(e => {
    const a = light(getComputedStyle(e).color), b = light(behind(e));
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.outerHTML.slice(0, 100)] }).filter(x => x[0] < 4.5) })()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a page with every section, a device, and hostile and very long names."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "device.json").write_text(json.dumps(device(device={"board": LONG})))
    report = whole(
        rows=[*rows(), row("compressed", EVIL, "int8", 0.6, executed=LONG)],
        ab=ab((EVIL, LONG)),
        data={"yaml": EVIL, "val_images": 87, "skipped": [LONG], "notes": [EVIL]},
        chain=[stage("baseline", 0.6), stage("prune", 0.55)],
    )
    images = [item(f"{LONG}.jpg", (EVIL, LONG), section=section) for section in ("lost", "invented", "random")]
    return write(devices.add(report, [folder / "device.json"]), images, folder)["html"]


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Browser]:
    assert PROGRAM is not None
    with chromium.browser(PROGRAM, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize(("width", "scheme"), VISITS)
def test_it_fits_logs_nothing_and_loads_nothing(tab: chromium.Browser, page: Path, width: int, scheme: str) -> None:
    tab.open(page, width, scheme)
    assert tab.value("innerWidth") == width, "the window does not have the requested width"
    assert tab.value("document.documentElement.scrollWidth") <= width
    assert tab.value(OUTSIDE) == []
    assert tab.problems() == [] and tab.requests() == []
    assert tab.value("document.scripts.length") == 0
    assert EVIL in tab.value("document.body.innerText")
    dark = tab.value("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)"
    assert dark == (scheme == "dark")


@pytest.mark.parametrize(("width", "scheme"), VISITS)
def test_it_can_be_read(tab: chromium.Browser, page: Path, width: int, scheme: str) -> None:
    tab.open(page, width, scheme)
    assert tab.value(CONTRAST) == []
    assert tab.value("[...document.images].filter(i => !i.alt || !i.naturalWidth).length") == 0
    assert tab.value("[...document.querySelectorAll('svg[role=img]')].filter(s => !s.ariaLabel).length") == 0
    shown = "[...document.querySelectorAll('.figure > div')].filter(d => d.offsetWidth).map(d => d.className)"
    assert set(tab.value(shown)) == {"wide" if width > 640 else "narrow"}
    assert tab.value(CLIPPED) == []


def test_links_lead_to_their_sections(tab: chromium.Browser, page: Path) -> None:
    tab.open(page, 1280, "light")
    dead = "[...document.querySelectorAll('a[href^=\"#\"]')].filter(a => !document.querySelector(a.getAttribute('href'))).length"
    assert tab.value(dead) == 0 and tab.value("document.querySelectorAll('nav a').length") > 10


def test_a_screenshot_is_an_image(tab: chromium.Browser, page: Path, tmp_path: Path) -> None:
    tab.open(page, 390, "dark")
    tab.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
