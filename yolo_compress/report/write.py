"""The three forms of the report, written into a folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from yolo_compress.files.atomic import atomic_write, storage_errors
from yolo_compress.report import as_text, html
from yolo_compress.report.charts import gallery
from yolo_compress.report.schema import Document


def write(document: Document, gallery_items: Sequence[gallery.Item], out: Path) -> dict[str, Path]:
    """Writes `report.html`, `report.md` and `report.json` into `out` (made if need be).

    Each file is replaced as a whole: a folder that a user names may hold the report of an earlier call.

    Args:
        document: From `document.build`; the charts are drawn from it.
        gallery_items: All are shown; none leaves the section out.
        out: Folder.

    Returns:
        "html", "md" and "json" with their paths.

    Raises:
        DataError: A gallery image that cannot be read.
        StorageError: The folder cannot be written.
    """
    texts = {
        "html": html.render(document, gallery.draw(gallery_items, len(gallery_items))),
        "md": as_text.render_markdown(document),
        "json": json.dumps(document, indent=1, allow_nan=False) + "\n",
    }
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    paths = {kind: out / f"report.{kind}" for kind in texts}
    for kind, text in texts.items():
        # A file name that is no UTF-8 arrives as lone surrogates: shown as its escape rather than refused.
        atomic_write(paths[kind], text.encode("utf-8", "backslashreplace"))
    return paths
