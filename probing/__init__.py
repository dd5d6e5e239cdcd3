"""Heads on frozen embeddings: fitting, evaluation and files."""
