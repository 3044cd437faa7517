"""What a run found, as one HTML file, Markdown and JSON.

`document.build` turns plain figures into the report's JSON document; `table`, `plots` and `gallery` draw from it;
`write.write` puts `report.html`, `report.md` and `report.json` into a folder. Nothing here measures anything.
"""
