"""Write the report into a folder, as HTML, Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from yolo_compress.files.atomic import atomic_write, storage_errors
from yolo_compress.report import as_text, html
from yolo_compress.report.charts import gallery
from yolo_compress.report.schema import Document


def write(document: Document, gallery_items: Sequence[gallery.Item], out: Path) -> dict[str, Path]:
    """Write `report.html`, `report.md` and `report.json` into the folder `out`, which is created if needed.

    Each file is replaced atomically, because the folder may hold an earlier report.

    Args:
        document: Result of `document.build`.
        gallery_items: Images to show. If there are none, the gallery is left out.
        out: Folder.

    Returns:
        Paths of the written files, under the keys "html", "md" and "json".

    Raises:
        DataError: A gallery image cannot be read.
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
        # Python holds a file name that is not UTF-8 as lone surrogates. They are written as escapes.
        atomic_write(paths[kind], text.encode("utf-8", "backslashreplace"))
    return paths
