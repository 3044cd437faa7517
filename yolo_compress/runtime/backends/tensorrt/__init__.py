"""TensorRT 8.5 to 11: build and run engines, log, and CUDA memory."""
