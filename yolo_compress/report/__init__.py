"""The report of a run, as one HTML file, as Markdown and as JSON.

`document.build` makes the JSON document from the measurements of the stages. Tables and charts use only that document.
`write.write` writes `report.html`, `report.md` and `report.json`. No model runs here: `measurements` computes intervals and error
types from the detections and latencies that bench and the stages stored. `devices` adds the figures of other machines.
"""
