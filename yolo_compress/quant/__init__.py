"""INT8 and FP16: placement, calibration, fake quantisation, and the ONNX graphs typed for the runtimes."""
