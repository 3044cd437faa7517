"""Is model B as good as model A? Both sides, the comparison at one threshold, latency, and the document."""
