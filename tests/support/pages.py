"""Parser of README and docs for tests: fenced blocks, commands, prose and anchors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_FENCE = re.compile(r"^```([\w-]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and its first line in the page."""

    page: str
    language: str
    text: str
    line: int


def blocks(page: Path, *languages: str) -> list[Block]:
    """Return the fenced blocks of a page in these languages, or all blocks if none is given."""
    text = page.read_text(encoding="utf-8")
    found = [
        Block(page.name, one[1], one[2], text.count("\n", 0, one.start()) + 2)
        for one in _FENCE.finditer(text)
        if not languages or one[1] in languages
    ]
    assert text.count("\n```") == 2 * len(list(_FENCE.finditer(text))), f"{page.name}: a fence is not closed"
    return found


def commands(page: Path) -> list[str]:
    """Return the commands of a page: the lines of `sh` blocks and the `$ ` lines of `console` blocks.

    Lines that end in a backslash are joined with the next.
    """
    found = []
    for block in blocks(page, "sh", "bash", "console"):
        joined = re.sub(r"\\\n\s*", "", block.text)
        lines = [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]
        if block.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        found += [re.sub(r"\s+# .*", "", line).strip() for line in lines]
    return found


def prose(page: Path) -> list[list[str]]:
    """Return the paragraphs, list items and tables of a page, each as its lines, without fenced blocks."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    found: list[list[str]] = []
    for part in re.split(r"\n\s*\n", text):
        lines = [line for line in part.splitlines() if line.strip()]
        for line in lines:
            if line is lines[0] or re.match(r"\s*([-*]|\d+\.) |#", line):
                found.append([])
            found[-1].append(line)
    return found


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page for `page.md#...`, by GitHub's rule for headings."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
