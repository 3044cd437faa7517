"""A/B comparison of two models: opening both models, comparison at one threshold, latency ratio, and the document."""
