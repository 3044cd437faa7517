"""Distillation: train a student model with the predictions and feature maps of a teacher model.

Losses are pure functions of tensors (feature.py, logits.py). taps.py reads the outputs of named layers, and teacher.py has the kinds
of teachers. checks.py checks that every loss term has an effect. inversion.py generates training images from a model. hook.py
adds the losses to the training loop.
"""
