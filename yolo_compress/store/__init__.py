"""The store of stage results (artefacts) in `weights/`: manifests, fingerprints, source weights and checks of disk space."""
