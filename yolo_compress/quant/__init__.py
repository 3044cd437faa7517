"""INT8 quantisation of a model: choice of the INT8 tensors, calibration, fake quantisation for QAT, sensitivity analysis."""
