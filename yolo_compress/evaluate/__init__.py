"""Accuracy and agreement of any backend on the same images, by the same code."""
