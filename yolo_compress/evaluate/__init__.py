"""Evaluation: accuracy, differences and errors of models on the same images. One code serves all backends."""
