"""The artefact store in `weights/`: artefacts, manifests, fingerprints, source weights and checks of free disk space."""
