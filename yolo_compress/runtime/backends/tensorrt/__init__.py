"""TensorRT 8.5 to 11: build, run, its log, and CUDA memory."""
