"""Heads on frozen embeddings: fitted, judged, kept."""
