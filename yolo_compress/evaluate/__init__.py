"""Evaluation: accuracy, differences and errors of models on the same images, with the same code for every backend."""
