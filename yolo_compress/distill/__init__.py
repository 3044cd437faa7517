"""Distillation: losses as pure functions of tensors (feature.py, logits.py), outputs of named layers (taps.py), the teacher or
peer (teacher.py), checks that every term has an effect (checks.py), and the training hook (hook.py)."""
