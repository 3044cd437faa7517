"""What a run found, as one HTML file, Markdown and JSON.

`document.build` turns plain figures into the report's JSON document; tables, charts and the gallery are drawn from it and
from nothing else; `write.write` puts `report.html`, `report.md` and `report.json` into a folder. No model runs here: `evidence`
makes intervals and error types of what bench and the stages kept (detections, raw latencies), `devices` adds other machines.
"""
