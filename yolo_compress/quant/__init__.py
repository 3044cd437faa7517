"""INT8 quantisation of a model: plan of the INT8 tensors, calibration, fake quantisation for QAT, sensitivity."""
