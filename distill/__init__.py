"""Targets of training: replayed augmentation, stored soft targets and embeddings, objectives."""
