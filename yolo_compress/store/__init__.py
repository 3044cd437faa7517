"""The artefact store below `weights/`: artefacts, manifests, fingerprints, source weights and free disk space."""
