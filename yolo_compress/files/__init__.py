"""Files read strictly and written whole: atomic writes, locks, strict YAML and JSON, CSV."""
