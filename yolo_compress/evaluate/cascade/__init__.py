"""Fit the router of a cascade of two models, choose its threshold, and compare the cascade with each model alone."""
