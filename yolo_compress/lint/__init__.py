"""Faults of any ONNX file before an engine is built from it. Needs onnx and numpy, neither torch nor ultralytics.

`check.check(file, target)` is the door; a rule is a row of the table at the bottom of `codes`, `scales`, `placement`,
`shapes`, `precision` or `operators`.
"""
