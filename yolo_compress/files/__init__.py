"""Reading and writing of files: atomic writes, locks, strict YAML and JSON, CSV."""
