"""Check any ONNX file before an engine is built from it. Needs onnx and numpy, neither torch nor ultralytics.

The entry point is `check.check(file, target)`. A rule is a row of the table at the bottom of `codes`, `scales`, `placement`,
`shapes`, `precision`, `operators` or `compiler`.
"""
