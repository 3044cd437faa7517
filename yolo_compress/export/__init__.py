"""Write model files: ONNX in FP32, FP16 and INT8 (Q/DQ), ONNX with NMS, TorchScript, TensorRT calibration cache."""
