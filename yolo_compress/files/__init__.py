"""Read and write files: atomic writes, locks, strict YAML and JSON, CSV."""
