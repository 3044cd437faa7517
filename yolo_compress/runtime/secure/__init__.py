"""Security of bundles on a robot: signature, unpacking, the two slots, and the record of engines that were built here."""
