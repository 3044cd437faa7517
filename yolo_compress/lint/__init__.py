"""Check any ONNX file before an engine is built from it. The check needs onnx and numpy, but not torch or ultralytics.

The entry point is `check.check(file, target)`. A rule is a row of the table at the bottom of `qdq_parameters`, `equal_scales`,
`placement`, `shapes`, `precision`, `operators` or `compiler`.
"""
