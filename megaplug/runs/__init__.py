"""A run's folder: identity, lock, state, metrics, checkpoints and their manifests. No torch in here."""
