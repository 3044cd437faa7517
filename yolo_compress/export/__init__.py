"""Files for the runtimes: ONNX in FP32, FP16 and INT8 (Q/DQ), TorchScript, NMS in the graph, TensorRT's calibration cache."""
